{{/* The scheduler's container. */}}
{{- define "vllm-pd-scheduler.scheduler" -}}
{{- $standalone := eq .Values.mode "standalone" }}
{{- $socket := and $standalone (not (include "vllm-pd-scheduler.shared" .)) }}
{{- $mounts := include "vllm-pd-scheduler.mounts" . -}}
- name: scheduler
  {{- if $standalone }}
  # Starts before Envoy and is stopped when that has ended: no request of a client goes without it.
  restartPolicy: Always
  {{- end }}
  image: {{ include "vllm-pd-scheduler.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  args:
    - serve
    - --config
    - {{ $mounts }}/config/config.json
    {{- with .Values.extraArgs }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .Values.extraEnv }}
  env:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  ports:
    {{- if not $socket }}
    - {name: grpc, containerPort: 9002}
    {{- end }}
    - {name: metrics, containerPort: 9090}
    {{- with .Values.config.metaserver_port }}
    - {name: metaserver, containerPort: {{ int . }}}
    {{- end }}
    {{- if .Values.admin.existingSecret }}
    - {name: admin, containerPort: 9003}
    {{- end }}
  startupProbe:
    httpGet: {path: /healthz, port: metrics}
    {{- toYaml .Values.probes.startup | nindent 4 }}
  livenessProbe:
    httpGet: {path: /healthz, port: metrics}
    {{- toYaml .Values.probes.liveness | nindent 4 }}
  readinessProbe:
    httpGet: {path: /readyz, port: metrics}
    {{- toYaml .Values.probes.readiness | nindent 4 }}
  {{- if not $standalone }}
  lifecycle:
    preStop:
      # Until the gateway has heard that this pod goes.
      exec: {command: [sleep, "5"]}
  {{- end }}
  resources:
    {{- toYaml .Values.resources | nindent 4 }}
  securityContext:
    {{- toYaml .Values.securityContext | nindent 4 }}
  volumeMounts:
    - {name: config, mountPath: {{ $mounts }}/config, readOnly: true}
    {{- if $socket }}
    - {name: socket, mountPath: /run/vllm-pd-scheduler}
    {{- end }}
    {{- if ne "{}" (include "vllm-pd-scheduler.reads" .) }}
    - {name: api-server, mountPath: /var/run/secrets/kubernetes.io/serviceaccount, readOnly: true}
    {{- end }}
    {{- range $folder, $_ := include "vllm-pd-scheduler.secrets" . | fromJson }}
    - {name: {{ $folder }}, mountPath: {{ $mounts }}/{{ $folder }}, readOnly: true}
    {{- end }}
    {{- with .Values.extraVolumeMounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}
