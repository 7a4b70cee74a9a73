"""Admission: which waiting request is served next, and how much memory request bodies may take."""
