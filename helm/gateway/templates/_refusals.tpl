{{/*
What cannot work and what a schema cannot say, in sentences. All of them at once.
*/}}
{{- define "gateway.refusals" -}}
{{- $wrong := list -}}
{{- $values := .Values -}}

{{- $owners := dict
  "server.host" "the gateway listens on every address of its pod"
  "server.port" "service.port is what clients see"
  "server.metrics_port" "service.metricsPort is what Prometheus sees"
  "server.workers" "set workers"
  "server.replicas" "set replicas or autoscaling.maxReplicas"
  "server.drain_seconds" "set drainSeconds"
  "server.spool_bytes" "set spool.size"
  "storage.database" "embedded keeps its books on its volume; with mode distributed, name the Secret with postgresql:// in secrets.database"
  "storage.redis" "name the Secret in secrets.redis"
  "storage.pepper" "name the Secret in secrets.pepper"
  "storage.blobs" "they are on the volume, or in the pod"
  "cache.redis" "name the Secret in secrets.cacheRedis"
  "ledger.spool" "settlements.existingClaim says where it is"
  "prices.file" "give its text as prices.list"
  "prices.rows" "give them as prices.rows, without config"
-}}
{{- range $path, $advice := $owners -}}
{{- $parts := splitList "." $path -}}
{{- $section := index $values.config (first $parts) | default dict -}}
{{- if hasKey $section (last $parts) -}}
{{- $wrong = append $wrong (printf "config.%s is set by the chart: %s" $path $advice) -}}
{{- end -}}
{{- end -}}

{{- $least := add (int $values.preStopSeconds) (int $values.drainSeconds) 30 -}}
{{- with $values.terminationGracePeriodSeconds -}}
{{- if lt (int .) (int $least) -}}
{{- $wrong = append $wrong (printf "terminationGracePeriodSeconds is %d, but preStopSeconds (%d), drainSeconds (%d) and 30 s to end in are %d: calls that still run would be killed and charged at their bound" (int .) (int $values.preStopSeconds) (int $values.drainSeconds) $least) -}}
{{- end -}}
{{- end -}}

{{- $longest := dict "seconds" 600 "of" "the longest call" -}}
{{- if $values.config.upstreams -}}
{{- $_ := set $longest "seconds" 0 -}}
{{- end -}}
{{- range $name, $upstream := $values.config.upstreams -}}
{{- $total := dig "timeouts" "total_seconds" 600 ($upstream | default dict) -}}
{{- if gt (float64 $total) (float64 $longest.seconds) -}}
{{- $_ := set $longest "seconds" $total -}}
{{- $_ := set $longest "of" (printf "config.upstreams.%s.timeouts.total_seconds" $name) -}}
{{- end -}}
{{- end -}}
{{- if lt (float64 $values.drainSeconds) (float64 $longest.seconds) -}}
{{- $wrong = append $wrong (printf "drainSeconds is %d, less than %s (%v s): calls that run at the end of a pod would be given up and charged at their bound" (int $values.drainSeconds) $longest.of $longest.seconds) -}}
{{- end -}}

{{- $files := list -}}
{{- range (include "gateway.secretFiles" . | fromYaml).items -}}
{{- if has .file $files -}}
{{- $wrong = append $wrong (printf "secrets.files: two secrets would be the file %s" .file) -}}
{{- end -}}
{{- $files = append $files .file -}}
{{- end -}}

{{- $text := toYaml (dict "config" $values.config "rows" $values.prices.rows) | replace "$$" "" -}}
{{- range regexFindAll "\\$\\{file:/run/secrets/gateway/[^}]*\\}" $text -1 | uniq -}}
{{- $file := . | trimPrefix "${file:/run/secrets/gateway/" | trimSuffix "}" -}}
{{- if not (has $file $files) -}}
{{- $wrong = append $wrong (printf "config refers to /run/secrets/gateway/%s, but secrets.files has no file %s" $file $file) -}}
{{- end -}}
{{- end -}}

{{- $variables := list -}}
{{- range $values.extraEnv -}}
{{- $variables = append $variables .name -}}
{{- if hasPrefix "GATEWAY_" .name -}}
{{- $wrong = append $wrong (printf "extraEnv: %s belongs into config, where the chart sees it" .name) -}}
{{- end -}}
{{- end -}}
{{- range regexFindAll "\\$\\{[A-Za-z_][A-Za-z0-9_]*\\}" $text -1 | uniq -}}
{{- $variable := . | trimPrefix "${" | trimSuffix "}" -}}
{{- if not (has $variable $variables) -}}
{{- $wrong = append $wrong (printf "config refers to the variable %s, which extraEnv does not set: a secret is better a file, \"${file:/run/secrets/gateway/NAME}\", with an entry in secrets.files" $variable) -}}
{{- end -}}
{{- end -}}

{{- if and $values.autoscaling.enabled (gt (int $values.autoscaling.minReplicas) (int $values.autoscaling.maxReplicas)) -}}
{{- $wrong = append $wrong "autoscaling.minReplicas is more than autoscaling.maxReplicas" -}}
{{- end -}}
{{- if and $values.autoscaling.enabled $values.replicas -}}
{{- $wrong = append $wrong "replicas cannot stand beside autoscaling.enabled, which decides: remove it, or set autoscaling.minReplicas" -}}
{{- end -}}

{{- $budget := $values.podDisruptionBudget -}}
{{- if include "gateway.disruptionBudget" . -}}
{{- $least := int (ternary $values.autoscaling.minReplicas (include "gateway.replicas" . | int) $values.autoscaling.enabled) -}}
{{- if and (kindIs "invalid" $budget.maxUnavailable) (kindIs "invalid" $budget.minAvailable) -}}
{{- $wrong = append $wrong "podDisruptionBudget needs minAvailable or maxUnavailable" -}}
{{- else if and (kindIs "invalid" $budget.maxUnavailable) (not (kindIs "string" $budget.minAvailable)) (ge (int $budget.minAvailable) $least) -}}
{{- $wrong = append $wrong (printf "podDisruptionBudget.minAvailable is %d of %d gateways: no node could ever be drained" (int $budget.minAvailable) $least) -}}
{{- end -}}
{{- end -}}

{{- if include "gateway.disruptionBudget" . -}}
{{- $least := int (ternary $values.autoscaling.minReplicas (include "gateway.replicas" . | int) $values.autoscaling.enabled) -}}
{{- if not (kindIs "invalid" $budget.maxUnavailable) -}}
{{- if has (toString $budget.maxUnavailable) (list "0" "0%") -}}
{{- $wrong = append $wrong (printf "podDisruptionBudget.maxUnavailable is %v: no node could ever be drained" $budget.maxUnavailable) -}}
{{- end -}}
{{- else if kindIs "string" $budget.minAvailable -}}
{{- $percent := trimSuffix "%" $budget.minAvailable | int -}}
{{- if gt (mul $percent $least) (mul 100 (sub $least 1)) -}}
{{- $wrong = append $wrong (printf "podDisruptionBudget.minAvailable is %s of %d gateways, which is all of them: no node could ever be drained" $budget.minAvailable $least) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- $cache := $values.config.cache | default dict -}}
{{- $cached := ne (toString $cache.enabled) "false" -}}
{{- if not (or (include "gateway.distributed" .) $values.persistence.existingClaim) -}}
{{- $spool := include "gateway.mebibytes" $values.spool.size | int64 -}}
{{- $parts := list (printf "spool.size %d MiB" $spool) -}}
{{- $sum := $spool -}}
{{- if not (or $values.secrets.redis.name $values.secrets.cacheRedis.name) -}}
{{- range $name := list "cache" "results" -}}
{{- $section := index $values.config $name | default dict -}}
{{- if ne (toString $section.enabled) "false" -}}
{{- $most := include "gateway.mebibytes" ($section.max_bytes | default "10GiB") | int64 -}}
{{- $parts = append $parts (printf "config.%s.max_bytes %d MiB" $name $most) -}}
{{- $sum = add $sum $most -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if lt (include "gateway.mebibytes" $values.persistence.size | int64) (int64 $sum) -}}
{{- $wrong = append $wrong (printf "persistence.size is %s, less than the %d MiB that may be put on the volume beside the books (%s): raise it, or lower those" $values.persistence.size (int64 $sum) (join " + " $parts)) -}}
{{- end -}}
{{- end -}}

{{- $server := $values.config.server | default dict -}}
{{- $buffer := include "gateway.mebibytes" ($server.buffer_bytes | default "128MiB") | int64 -}}
{{- $front := ternary (include "gateway.mebibytes" ($cache.memory_bytes | default "64MiB") | int64) 0 $cached | int64 -}}
{{- $wanted := add $buffer (mul (int $values.workers) (add 160 $front)) | int64 -}}
{{- with include "gateway.mebibytes" $values.resources.limits.memory -}}
{{- if lt (int64 .) $wanted -}}
{{- $wrong = append $wrong (printf "resources.limits.memory is %v, but the gateway may want %d MiB: config.server.buffer_bytes %d MiB, and for each of %d workers about 160 MiB and config.cache.memory_bytes %d MiB" $values.resources.limits.memory $wanted $buffer (int $values.workers) $front) -}}
{{- end -}}
{{- end -}}

{{- $policy := $values.networkPolicy -}}
{{- if $policy.enabled -}}
{{- $open := list -}}
{{- range $policy.upstreamPorts -}}{{- $open = append $open (int .) -}}{{- end -}}
{{- $every := false -}}
{{- range $policy.extraEgress -}}
{{- if not .ports -}}{{- $every = true -}}{{- end -}}
{{- range .ports -}}
{{- if or (not .port) (kindIs "string" .port) .endPort -}}{{- $every = true -}}{{- else -}}{{- $open = append $open (int .port) -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- range (include "gateway.targets" . | fromYaml).items -}}
{{- if not (or $every (has (int .port) $open)) -}}
{{- $wrong = append $wrong (printf "%s goes to port %d, which networkPolicy lets nothing out to: add it to networkPolicy.upstreamPorts, or its receiver to networkPolicy.extraEgress" .path (int .port)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- $monitor := $values.serviceMonitor -}}
{{- $units := dict "ms" 1 "s" 1000 "m" 60000 "h" 3600000 -}}
{{- $times := list -}}
{{- range list $monitor.scrapeTimeout $monitor.interval -}}
{{- $times = append $times (mul (regexFind "^[0-9]+" . | int64) (index $units (regexFind "[a-z]+$" .) | int64)) -}}
{{- end -}}
{{- if gt (first $times) (last $times) -}}
{{- $wrong = append $wrong (printf "serviceMonitor.scrapeTimeout (%s) is longer than serviceMonitor.interval (%s): Prometheus would refuse it" $monitor.scrapeTimeout $monitor.interval) -}}
{{- end -}}

{{- $alerts := list -}}
{{- range $path, $_ := .Files.Glob "rules/*.yaml" -}}
{{- range ($.Files.Get $path | fromYaml).groups -}}
{{- range .rules -}}
{{- with .alert -}}{{- $alerts = append $alerts . -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $values.prometheusRule.disabled -}}
{{- if not (has . $alerts) -}}
{{- $wrong = append $wrong (printf "prometheusRule.disabled: there is no alert %s" .) -}}
{{- end -}}
{{- end -}}

{{- range $label := list "name" "instance" "component" -}}
{{- if hasKey $values.podLabels (printf "app.kubernetes.io/%s" $label) -}}
{{- $wrong = append $wrong (printf "podLabels: app.kubernetes.io/%s is set by the chart, which finds its pods by it" $label) -}}
{{- end -}}
{{- end -}}

{{- if $wrong -}}
{{- printf "\n\nThese values cannot work:\n  - %s\n" (join "\n  - " $wrong) | fail -}}
{{- end -}}
{{- end -}}
