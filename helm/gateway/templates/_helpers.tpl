{{- define "gateway.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* A service's name begins with a letter. */}}
{{- define "gateway.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if and (contains (include "gateway.name" .) .Release.Name) (regexMatch "^[a-z]" .Release.Name) -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else if regexMatch "^[0-9]" .Release.Name -}}
{{- printf "%s-%s" (include "gateway.name" .) .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "gateway.name" .) | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Of every pod of the release; what selects must say the component, too. */}}
{{- define "gateway.selector" -}}
app.kubernetes.io/name: {{ include "gateway.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "gateway.labels" -}}
{{ include "gateway.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "gateway.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "gateway.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "gateway.fullname" .) }}
{{- else -}}
{{ .Values.serviceAccount.name }}
{{- end -}}
{{- end -}}

{{- define "gateway.distributed" -}}
{{- if eq .Values.mode "distributed" }}yes{{ end -}}
{{- end -}}

{{/* How many gateways there are, or may be at the most. */}}
{{- define "gateway.replicas" -}}
{{- if not (include "gateway.distributed" .) -}}
1
{{- else if .Values.autoscaling.enabled -}}
{{ int .Values.autoscaling.maxReplicas }}
{{- else -}}
{{ .Values.replicas | default 2 | int }}
{{- end -}}
{{- end -}}

{{/* Whether something may stand between them: a budget for one would keep it on its node. */}}
{{- define "gateway.disruptionBudget" -}}
{{- $least := int (ternary .Values.autoscaling.minReplicas (include "gateway.replicas" . | int) .Values.autoscaling.enabled) -}}
{{- $enabled := .Values.podDisruptionBudget.enabled -}}
{{- if and (include "gateway.distributed" .) (or (eq (toString $enabled) "true") (and (kindIs "invalid" $enabled) (gt $least 1))) }}yes{{ end -}}
{{- end -}}

{{- define "gateway.gracePeriod" -}}
{{- $least := add (int .Values.preStopSeconds) (int .Values.drainSeconds) 30 -}}
{{- .Values.terminationGracePeriodSeconds | default $least | int -}}
{{- end -}}

{{- define "gateway.migrates" -}}
{{- if and (include "gateway.distributed" .) .Values.migration.enabled }}yes{{ end -}}
{{- end -}}

{{/* The secrets that are named, as {"items": [{name, key, file}]}. */}}
{{- define "gateway.secretFiles" -}}
{{- $items := list -}}
{{- range $value, $file := dict "database" "database" "redis" "redis" "cacheRedis" "cache-redis" "pepper" "pepper" -}}
{{- $secret := index $.Values.secrets $value -}}
{{- if $secret.name -}}
{{- $items = append $items (dict "name" $secret.name "key" $secret.key "file" $file) -}}
{{- end -}}
{{- end -}}
{{- toYaml (dict "items" (concat $items .Values.secrets.files)) -}}
{{- end -}}

{{/* On the volume of the books, if it is not one of its own. */}}
{{- define "gateway.settlementsPath" -}}
{{- if or (include "gateway.distributed" .) .Values.settlements.existingClaim -}}
/var/lib/settlements
{{- else -}}
/var/lib/gateway/settlements
{{- end -}}
{{- end -}}

{{/* What the spool may take of a pod's disk before the pod is evicted: a quarter more than the
gateway itself allows. */}}
{{- define "gateway.spoolLimit" -}}
{{- $size := .Values.spool.size -}}
{{- $mebi := ternary 1024 1 (hasSuffix "Gi" $size) | mul (regexFind "^[0-9]+" $size | int) -}}
{{- printf "%dMi" (div (mul $mebi 5) 4) -}}
{{- end -}}

{{/* A size of the gateway or a quantity of Kubernetes (10GiB, 1.5Gi, 512M, or a number) in MiB, and
nothing where it is none. */}}
{{- define "gateway.mebibytes" -}}
{{- $units := dict "" 1 "B" 1 "K" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- $text := ternary (toString .) (printf "%.0f" (float64 .)) (kindIs "string" .) | trim -}}
{{- $number := regexFind "^[0-9]+(\\.[0-9]+)?" $text -}}
{{- $unit := trimPrefix $number $text | trim | replace "k" "K" -}}
{{- if ne $unit "B" -}}{{- $unit = trimSuffix "B" $unit -}}{{- end -}}
{{- if and $number (hasKey $units $unit) -}}
{{- divf (mulf (float64 $number) (index $units $unit | float64)) 1048576.0 | floor | int64 -}}
{{- end -}}
{{- end -}}

{{/* Where the configuration sends something, as {"items": [{path, host, port}]}. A variable stands
for what extraEnv says. */}}
{{- define "gateway.targets" -}}
{{- $found := list -}}
{{- $config := .Values.config -}}
{{- $urls := dict -}}
{{- range $name, $upstream := $config.upstreams -}}
{{- if $upstream.proxy -}}
{{- $_ := set $urls (printf "config.upstreams.%s.proxy" $name) $upstream.proxy -}}
{{- else -}}
{{- $_ := set $urls (printf "config.upstreams.%s.base_url" $name) ($upstream.base_url | default "") -}}
{{- end -}}
{{- end -}}
{{- range list (list "tracing" "otlp") (list "notify" "webhook") (list "results" "webhook") -}}
{{- $section := index $config (first .) | default dict -}}
{{- $_ := set $urls (printf "config.%s.%s" (first .) (last .)) (index $section (last .) | default "") -}}
{{- end -}}
{{- range $path, $url := $urls -}}
{{- $url = toString $url -}}
{{- range $.Values.extraEnv -}}
{{- $url = replace (printf "${%s}" .name) (.value | default "" | toString) $url -}}
{{- end -}}
{{- if regexMatch "^https?://[^$]+$" $url -}}
{{- $authority := regexReplaceAll "^https?://([^/?#]*@)?" $url "" | regexFind "^[^/?#]*" -}}
{{- $host := regexReplaceAll ":[0-9]+$" $authority "" -}}
{{- $port := regexFind ":[0-9]+$" $authority | trimPrefix ":" | default (ternary "443" "80" (hasPrefix "https:" $url)) | int -}}
{{- $found = append $found (dict "path" $path "host" $host "port" $port) -}}
{{- end -}}
{{- end -}}
{{- toYaml (dict "items" $found) -}}
{{- end -}}

{{/* Whether one of them is a service of the cluster: an ipBlock does not mean pods everywhere. */}}
{{- define "gateway.targetsInside" -}}
{{- range (include "gateway.targets" . | fromYaml).items -}}
{{- if regexMatch "^[a-z0-9-]+$|\\.svc(\\.|$)|\\.cluster\\.local$" .host }}yes{{ end -}}
{{- end -}}
{{- end -}}

{{/* What of the configuration is the chart's own. */}}
{{- define "gateway.ownConfig" -}}
{{- $secrets := .Values.secrets -}}
{{- $data := "/var/lib/gateway" -}}
server:
  host: 0.0.0.0
  port: 8080
  metrics_port: 9090
  workers: {{ int .Values.workers }}
  replicas: {{ include "gateway.replicas" . }}
  drain_seconds: {{ int .Values.drainSeconds }}
  spool_bytes: {{ .Values.spool.size }}B
storage:
  {{- if include "gateway.distributed" . }}
  database: ${file:/run/secrets/gateway/database}
  {{- else }}
  database: sqlite:///{{ $data }}/gateway.db
  {{- end }}
  {{- if $secrets.redis.name }}
  redis: ${file:/run/secrets/gateway/redis}
  {{- end }}
  {{- if $secrets.pepper.name }}
  pepper: ${file:/run/secrets/gateway/pepper}
  {{- end }}
  blobs: {{ $data }}/blobs
ledger:
  spool: {{ include "gateway.settlementsPath" . }}
{{- if $secrets.cacheRedis.name }}
cache:
  redis: ${file:/run/secrets/gateway/cache-redis}
{{- end }}
{{- if or .Values.prices.rows .Values.prices.list }}
prices:
  {{- if .Values.prices.list }}
  file: /etc/gateway/prices.yaml
  {{- end }}
  {{- with .Values.prices.rows }}
  rows:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* gateway.yaml, as the gateway reads it. */}}
{{- define "gateway.config" -}}
{{- toYaml (mergeOverwrite (deepCopy .Values.config) (include "gateway.ownConfig" . | fromYaml)) -}}
{{- end -}}

{{- define "gateway.configData" -}}
gateway.yaml: |
  {{- include "gateway.config" . | nindent 2 }}
{{- with .Values.prices.list }}
{{ toYaml (dict "prices.yaml" .) }}
{{- end }}
{{- end -}}

{{/* Changes where running gateways cannot take a new configuration over by themselves. */}}
{{- define "gateway.restartChecksum" -}}
{{- $taken := dict "storage" (list "pepper" "old_peppers") "cache" (list "enabled" "scope" "ttl") -}}
{{- $kept := dict -}}
{{- range $name, $section := omit (include "gateway.config" . | fromYaml) "upstreams" "models" "prices" "teams" "notify" "relay" -}}
{{- range $setting, $value := $section -}}
{{- if not (has $setting (index $taken $name | default list)) -}}
{{- $_ := set $kept (printf "%s.%s" $name $setting) $value -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toYaml $kept | sha256sum -}}
{{- end -}}

{{- define "gateway.podSecurityContext" -}}
runAsNonRoot: true
{{- with .Values.runAsUser }}
runAsUser: {{ int64 . }}
fsGroup: {{ int64 . }}
{{- end }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "gateway.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "gateway.env" -}}
- name: GATEWAY_CONFIG
  value: /etc/gateway/gateway.yaml
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The volumes and mounts that every command of the gateway needs: {"root": ., "config": name}. */}}
{{- define "gateway.commonVolumes" -}}
- name: config
  configMap:
    name: {{ .config | quote }}
- name: tmp
  emptyDir:
    sizeLimit: {{ .root.Values.tmp.sizeLimit }}
{{- $files := (include "gateway.secretFiles" .root | fromYaml).items }}
{{- if $files }}
- name: secrets
  projected:
    defaultMode: 0440
    sources:
      {{- range $files }}
      - secret:
          name: {{ .name | quote }}
          items:
            - key: {{ .key | quote }}
              path: {{ .file | quote }}
      {{- end }}
{{- end }}
{{- with .root.Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "gateway.commonMounts" -}}
- name: config
  mountPath: /etc/gateway
  readOnly: true
- name: tmp
  mountPath: /tmp
{{- if (include "gateway.secretFiles" . | fromYaml).items }}
- name: secrets
  mountPath: /run/secrets/gateway
  readOnly: true
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "gateway.scheduling" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Those of the values, and the disk of the pod's folders where they say nothing of it: what
requests less than it uses goes first when its node is short. */}}
{{- define "gateway.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- $requests := $resources.requests | default dict -}}
{{- if not (or (hasKey $requests "ephemeral-storage") (hasKey $resources.limits "ephemeral-storage")) -}}
{{- $disk := include "gateway.mebibytes" .Values.tmp.sizeLimit | int64 -}}
{{- if include "gateway.distributed" . -}}
{{- $disk = include "gateway.spoolLimit" . | include "gateway.mebibytes" | int64 | add $disk -}}
{{- if not .Values.settlements.existingClaim -}}
{{- $disk = include "gateway.mebibytes" .Values.settlements.sizeLimit | int64 | add $disk -}}
{{- end -}}
{{- end -}}
{{- $_ := set $requests "ephemeral-storage" (printf "%dMi" (int64 $disk)) -}}
{{- $_ := set $resources "requests" $requests -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* One command of a hook: {"root": ., "name": of the container, "args": [...]}. */}}
{{- define "gateway.command" -}}
- name: {{ .name }}
  image: {{ include "gateway.image" .root | quote }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  args: {{ toJson .args }}
  env:
    {{- include "gateway.env" .root | nindent 4 }}
  resources:
    {{- toYaml .root.Values.migration.resources | nindent 4 }}
  securityContext:
    {{- include "gateway.securityContext" .root | nindent 4 }}
  volumeMounts:
    {{- include "gateway.commonMounts" .root | nindent 4 }}
{{- end -}}

{{/* Where packets may go: {"root": ., "ports": [...]}; never to the metadata of a cloud. */}}
{{- define "gateway.anywhere" -}}
{{- $four := list "169.254.0.0/16" "100.100.100.200/32" -}}
{{- $six := list "fe80::/10" "fd00:ec2::254/128" -}}
{{- range .Values.networkPolicy.exceptCidrs -}}
{{- if contains ":" . -}}{{- $six = append $six . -}}{{- else -}}{{- $four = append $four . -}}{{- end -}}
{{- end -}}
- ipBlock:
    cidr: 0.0.0.0/0
    except:
      {{- toYaml $four | nindent 6 }}
- ipBlock:
    cidr: ::/0
    except:
      {{- toYaml $six | nindent 6 }}
{{- end -}}

{{/* A store may also be a pod, which an ipBlock does not mean everywhere. */}}
{{- define "gateway.store" -}}
- namespaceSelector: {}
- ipBlock:
    cidr: 0.0.0.0/0
    except: [169.254.0.0/16, 100.100.100.200/32]
- ipBlock:
    cidr: ::/0
    except: [fe80::/10, "fd00:ec2::254/128"]
{{- end -}}

{{- define "gateway.ports" -}}
{{- range . }}
- protocol: TCP
  port: {{ int . }}
{{- end }}
{{- end -}}
