"""The platform's own program, with as many Secrets and routes added as `bench:count` says.

They are added here and not in the stack file: the engine hands a program its whole configuration in
one environment variable, which Linux limits to 128 KiB (pulumi/pulumi#8680), some 700 of them.
"""

import json
import runpy
import sys

import pulumi
from pulumi.runtime.config import get_config_env, get_config_secret_keys_env

from bench.larger import larger
from rehearsal.run import CHECKOUT

count = pulumi.Config("bench").get_int("count") or 0
config = get_config_env()
if count:
    sections = larger(config, secrets=count, routes=count)
    config = {k: v if isinstance(v, str) else json.dumps(v) for k, v in sections.items()}
pulumi.runtime.set_all_config(config, get_config_secret_keys_env())
runpy.run_path(str(CHECKOUT / "__main__.py"), run_name="__main__")

# For the figure that a stack without a tunnel does not pay for one.
print("imported:", *sorted({module.partition(".")[0] for module in sys.modules}))
