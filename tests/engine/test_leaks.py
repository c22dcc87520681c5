"""No secret is in the clear anywhere outside the cluster and the host's files.

One stack holds a canary in every source of a secret there is, and goes through its life: previewed,
brought up past two failed tries, rotated, refreshed, destroyed. `story` is all that a person or a
log collector could have seen of it. Each canary has a core of letters and digits, which URL, JSON,
YAML and shell quoting leave as it is; it is looked for as such and in base64, up to twice.

In `pulumi -v=9 --logtostderr` the engine itself prints what it exchanges with plugins and programs.
It masks what is marked secret, with one exception of its own: `Rehearsal.PULUMI_CONFIG`.
"""
