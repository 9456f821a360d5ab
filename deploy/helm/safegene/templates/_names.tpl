{{- define "safegene.name" -}}
{{- $name := contains "safegene" .Release.Name | ternary .Release.Name (printf "%s-safegene" .Release.Name) }}
{{- $name | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "safegene.selector" -}}
app.kubernetes.io/name: safegene
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "safegene.labels" -}}
{{ include "safegene.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "safegene.image" -}}
{{ .Values.image.repository }}{{ if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end }}
{{- end }}

{{- define "safegene.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "safegene.name" .) }}
{{- end }}

{{/* What only several values together show to be wrong. */}}
{{- define "safegene.refuse" -}}
{{- $many := or (gt (int .Values.replicas) 1) .Values.autoscaling.enabled }}
{{- if and $many (not .Values.registry.urlSecret.name) }}
{{- fail "several replicas share one registry: give registry.urlSecret.name, a secret with a postgresql:// URL (an SQLite file is for one replica)" }}
{{- end }}
{{- if and (not .Values.family.volume) (not .Values.model.volume) }}
{{- fail "family.path lies on a volume: give family.volume, or model.volume if it holds the family too" }}
{{- end }}
{{- if and .Values.metrics.serviceMonitor.enabled (not .Values.metrics.keySecret.name) }}
{{- fail "/metrics asks for a key: give metrics.keySecret.name for the ServiceMonitor" }}
{{- end }}
{{- range $taken := list "registry" "registry_file" "store" "keys" }}
{{- if hasKey $.Values.settings $taken }}
{{- fail (printf "settings.%s is written by the chart: use its own values (registry, store, keys)" $taken) }}
{{- end }}
{{- end }}
{{- with (.Values.settings.access | default dict).public }}
{{- range $path := list "/health" "/v1/safegene/ready" }}
{{- if not (has $path (index $.Values.settings.access "public")) }}
{{- fail (printf "settings.access.public lacks %s, which the probes ask without a key" $path) }}
{{- end }}
{{- end }}
{{- end }}
{{- range .Values.keys }}
{{- if eq .name "prometheus" }}{{ fail "the key `prometheus` is made by metrics.keySecret" }}{{ end }}
{{- end }}
{{- end }}

{{/* The first keys, metrics' own among them. */}}
{{- define "safegene.keys" -}}
{{- $keys := .Values.keys }}
{{- if .Values.metrics.keySecret.name }}
{{- $keys = append $keys (dict "name" "prometheus" "scopes" (list "read") "tenants" (list "*") "secret" .Values.metrics.keySecret) }}
{{- end }}
{{- $keys | toJson }}
{{- end }}
