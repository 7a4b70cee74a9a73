{{/* How the kubelet asks the scheduler; call with (list $ "path of the admin interface" "gRPC health service"). */}}
{{- define "vllm-pd-scheduler.ask" -}}
{{- $root := index . 0 -}}
{{- if eq $root.Values.mode "epp" -}}
grpc: {port: 9003, service: {{ index . 2 }}}
{{- else if $root.Values.admin.existingSecret -}}
httpGet: {path: {{ index . 1 }}, port: admin{{ if $root.Values.tls.admin }}, scheme: HTTPS{{ end }}}
{{- else -}}
exec:
  command:
    - python3
    - -c
    - import urllib.request as u; u.build_opener(u.ProxyHandler({})).open("http://127.0.0.1:{{ include "vllm-pd-scheduler.adminPort" $root }}{{ index . 1 }}", timeout=3)
{{- end }}
{{- end }}
