{{- define "spaceport.labels" -}}
app.kubernetes.io/part-of: spaceport
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- /* User name of a service account of this release: dict "root" . "name" NAME */ -}}
{{- define "spaceport.user" -}}
system:serviceaccount:{{ .root.Release.Namespace }}:{{ .name }}
{{- end }}
