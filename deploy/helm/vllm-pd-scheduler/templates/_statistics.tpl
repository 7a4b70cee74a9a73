{{/* What Envoy gets besides its own configuration: a listener that has its statistics and nothing else. */}}
{{- define "vllm-pd-scheduler.statistics" -}}
static_resources:
  listeners:
    - name: statistics
      address: {socket_address: {address: {{ .Values.listenHost | quote }}, port_value: {{ .Values.envoy.statistics.port }}{{ if eq .Values.listenHost "::" }}, ipv4_compat: true{{ end }}}}
      filter_chains:
        - filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
                stat_prefix: statistics
                http_filters:
                  - name: envoy.filters.http.router
                    typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
                route_config:
                  virtual_hosts:
                    - name: all
                      domains: ["*"]
                      routes:
                        - match: {path: /stats/prometheus, headers: [{name: ":method", string_match: {exact: GET}}]}
                          route: {cluster: admin}
  clusters:
    - name: admin
      type: STATIC
      load_assignment:
        cluster_name: admin
        endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: {{ .Values.envoy.adminPort }}}}}}]}]
{{- end }}
