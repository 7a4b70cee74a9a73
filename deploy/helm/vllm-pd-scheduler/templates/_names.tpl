{{/* Names and labels. */}}

{{- define "vllm-pd-scheduler.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "vllm-pd-scheduler.fullname" -}}
{{- $name := include "vllm-pd-scheduler.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "vllm-pd-scheduler.selector" -}}
app.kubernetes.io/name: {{ include "vllm-pd-scheduler.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "vllm-pd-scheduler.valkeySelector" -}}
app.kubernetes.io/name: {{ printf "%s-valkey" (include "vllm-pd-scheduler.name" .) | trunc 63 | trimSuffix "-" | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "vllm-pd-scheduler.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "vllm-pd-scheduler.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* metadata of an object; call with (list $ "suffix of the name") */}}
{{- define "vllm-pd-scheduler.metadata" -}}
{{- $root := index . 0 -}}
name: {{ printf "%s%s" (include "vllm-pd-scheduler.fullname" $root) (index . 1) | quote }}
namespace: {{ $root.Release.Namespace | quote }}
labels:
  {{- include "vllm-pd-scheduler.labels" $root | nindent 2 }}
{{- end }}

{{- define "vllm-pd-scheduler.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "vllm-pd-scheduler.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "vllm-pd-scheduler.poolName" -}}
{{- default (include "vllm-pd-scheduler.fullname" .) .Values.inferencePool.name }}
{{- end }}

{{- define "vllm-pd-scheduler.image" -}}
{{- with .Values.image }}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ default $.Chart.AppVersion .tag }}{{ end }}
{{- end }}
{{- end }}
