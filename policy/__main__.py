"""What the engine starts. Creating a PolicyPack serves it and never returns: rules are in rules."""

from pulumi_policy import PolicyPack
from rules import POLICIES

PolicyPack("homelab", policies=[*POLICIES])
