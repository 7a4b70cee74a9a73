"""Kubernetes as a source of instances."""

from .source import KubernetesPods

__all__ = ["KubernetesPods"]
