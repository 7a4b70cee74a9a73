{{/* The scheduler's configuration: the values' `config`, and what the chart decides. */}}

{{- define "vllm-pd-scheduler.mounts" -}}/etc/vllm-pd-scheduler{{- end }}

{{- define "vllm-pd-scheduler.drainTimeout" -}}
{{- if hasKey .Values.config "drain_timeout" }}{{ ceil .Values.config.drain_timeout | int }}{{ else }}30{{ end }}
{{- end }}

{{- define "vllm-pd-scheduler.fleetLabels" -}}
{{- .Values.fleet.matchLabels | default (dict "llm-d.ai/inference-serving" "true") | toYaml }}
{{- end }}

{{/* The sources of instances, as JSON: those of `config`, else the pods of `fleet`. */}}
{{- define "vllm-pd-scheduler.discovery" -}}
{{- $config := .Values.config }}
{{- if or (hasKey $config "discovery") $config.prefill_instances $config.decode_instances $config.instance_files }}
{{- $config.discovery | default list | toJson }}
{{- else if eq .Values.mode "epp" }}
{{- list (dict "type" "kubernetes" "pool" (include "vllm-pd-scheduler.poolName" .)) | toJson }}
{{- else }}
{{- $labels := list }}
{{- range $key, $value := include "vllm-pd-scheduler.fleetLabels" . | fromYaml }}
{{- $labels = append $labels (printf "%s=%s" $key $value) }}
{{- end }}
{{- list (dict "type" "kubernetes" "selector" (join "," $labels) "ports" .Values.fleet.ports) | toJson }}
{{- end }}
{{- end }}

{{/* Not empty if the schedulers of all pods share what they do. */}}
{{- define "vllm-pd-scheduler.shared" -}}
{{- if or .Values.valkey.enabled .Values.config.replicas }}yes{{ end }}
{{- end }}

{{/* The name of the headless Service by which an Envoy finds the schedulers of the other pods. */}}
{{- define "vllm-pd-scheduler.peers" -}}
{{ include "vllm-pd-scheduler.fullname" . }}-schedulers
{{- end }}

{{- define "vllm-pd-scheduler.config" -}}
{{- $config := deepCopy .Values.config }}
{{- if and .Values.tls.admin (not .Values.admin.existingSecret) }}
{{- fail "tls.admin: needs admin.existingSecret, a Secret with a token: without it the admin interface can be reached from within the pod only" }}
{{- end }}
{{- $mounts := include "vllm-pd-scheduler.mounts" . }}
{{- $_ := set $config "discovery" (include "vllm-pd-scheduler.discovery" . | fromJsonArray) }}
{{- $_ = set $config "metrics_host" .Values.listenHost }}
{{- $_ = set $config "metrics_port" 9090 }}
{{- if $config.metaserver_port }}
{{- $_ = set $config "metaserver_host" .Values.listenHost }}
{{- end }}
{{- if eq .Values.mode "epp" }}
{{- $_ = set $config "grpc_host" .Values.listenHost }}
{{- if .Values.tls.grpc }}
{{- $_ = set $config "grpc_tls" (dict "cert" (printf "%s/grpc-tls/tls.crt" $mounts) "key" (printf "%s/grpc-tls/tls.key" $mounts)) }}
{{- else }}
{{- $_ = set $config "grpc_tls" (dict "self_signed" true) }}
{{- end }}
{{- else if include "vllm-pd-scheduler.shared" . }}
{{- $_ = set $config "grpc_host" .Values.listenHost }}
{{- if .Values.tls.grpc }}
{{- $_ = set $config "grpc_tls" (dict "cert" (printf "%s/grpc-tls/tls.crt" $mounts) "key" (printf "%s/grpc-tls/tls.key" $mounts) "client_ca" (printf "%s/grpc-tls/ca.crt" $mounts)) }}
{{- end }}
{{- else }}
{{- $_ = set $config "grpc_socket" "/run/vllm-pd-scheduler/grpc" }}
{{- end }}
{{- if include "vllm-pd-scheduler.shared" . }}
{{- $shared := $config.replicas | default dict }}
{{- with .Values.valkey }}
{{- if and .enabled $shared.url }}
{{- fail "valkey.enabled: config.replicas.url names another server: set one of the two" }}
{{- end }}
{{- if and .enabled (not .existingSecret) }}
{{- fail "valkey.enabled: needs valkey.existingSecret, a Secret with a password" }}
{{- end }}
{{- if .enabled }}
{{- $_ = set $shared "url" (printf "valkey://%s-valkey:6379" (include "vllm-pd-scheduler.fullname" $)) }}
{{- end }}
{{- if .existingSecret }}
{{- $_ = set $shared "password" (dict "file" (printf "%s/valkey/%s" $mounts .secretKey)) }}
{{- end }}
{{- end }}
{{- $_ = set $config "replicas" $shared }}
{{- end }}
{{- if .Values.admin.existingSecret }}
{{- $_ = set $config "admin_host" .Values.listenHost }}
{{- $_ = set $config "admin_token" (dict "file" (printf "%s/admin/%s" $mounts .Values.admin.secretKey)) }}
{{- end }}
{{- if .Values.tls.admin }}
{{- $_ = set $config "admin_tls" (dict "cert" (printf "%s/admin-tls/tls.crt" $mounts) "key" (printf "%s/admin-tls/tls.key" $mounts)) }}
{{- end }}
{{- if .Values.apiKey.existingSecret }}
{{- $_ = set $config "api_key" (dict "file" (printf "%s/api-key/%s" $mounts .Values.apiKey.secretKey)) }}
{{- end }}
{{- with .Values.tls.instances }}
{{- if .enabled }}
{{- $tls := dict }}
{{- if .existingSecret }}
{{- $_ = set $tls "ca" (printf "%s/instance-tls/ca.crt" $mounts) }}
{{- if .clientCertificate }}
{{- $_ = set $tls "cert" (printf "%s/instance-tls/tls.crt" $mounts) }}
{{- $_ = set $tls "key" (printf "%s/instance-tls/tls.key" $mounts) }}
{{- end }}
{{- end }}
{{- with .serverName }}
{{- $_ = set $tls "server_name" . }}
{{- end }}
{{- $_ = set $config "instance_tls" $tls }}
{{- end }}
{{- end }}
{{- toPrettyJson $config }}
{{- end }}

{{/* Secrets that are mounted, as a JSON object: folder below the mounts -> name of the Secret. */}}
{{- define "vllm-pd-scheduler.secrets" -}}
{{- $secrets := dict }}
{{- with .Values.admin.existingSecret }}{{ $_ := set $secrets "admin" . }}{{ end }}
{{- with .Values.tls.admin }}{{ $_ := set $secrets "admin-tls" . }}{{ end }}
{{- with .Values.apiKey.existingSecret }}{{ $_ := set $secrets "api-key" . }}{{ end }}
{{- if include "vllm-pd-scheduler.shared" . }}{{ with .Values.valkey.existingSecret }}{{ $_ := set $secrets "valkey" . }}{{ end }}{{ end }}
{{- if or (eq .Values.mode "epp") (include "vllm-pd-scheduler.shared" .) }}{{ with .Values.tls.grpc }}{{ $_ := set $secrets "grpc-tls" . }}{{ end }}{{ end }}
{{- if .Values.tls.instances.enabled }}{{ with .Values.tls.instances.existingSecret }}{{ $_ := set $secrets "instance-tls" . }}{{ end }}{{ end }}
{{- toJson $secrets }}
{{- end }}

{{/* What the sources of instances need to read, as a JSON object: namespace -> API group -> resources. */}}
{{- define "vllm-pd-scheduler.reads" -}}
{{- $root := . }}
{{- $reads := dict }}
{{- range include "vllm-pd-scheduler.discovery" . | fromJsonArray }}
{{- if and (eq .type "kubernetes") (not .kubeconfig) }}
{{- $namespace := default $root.Release.Namespace .namespace }}
{{- $groups := get $reads $namespace | default dict }}
{{- if .services }}
{{- $_ := set $groups "discovery.k8s.io" (list "endpointslices") }}
{{- else }}
{{- $_ := set $groups "" (list "pods") }}
{{- end }}
{{- if .pool }}
{{- $_ := set $groups "inference.networking.k8s.io" (list "inferencepools") }}
{{- $_ = set $groups "llm-d.ai" (list "inferencemodelrewrites" "inferenceobjectives") }}
{{- /* where they were once */}}
{{- $_ = set $groups "inference.networking.x-k8s.io" (list "inferenceobjectives") }}
{{- end }}
{{- $_ := set $reads $namespace $groups }}
{{- end }}
{{- end }}
{{- toJson $reads }}
{{- end }}
