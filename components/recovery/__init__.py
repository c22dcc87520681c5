"""Taking into the state what exists: after a run that died, after a lost state, from another maker.

One mechanism for all three. An object that the program declares and the state does not hold is
found by its natural key (see :mod:`components.recovery.keys`). It is put into the state with its id
and with the inputs that the program declares, and `pulumi refresh` then reads what it really is.
So nothing is made twice and nothing is written; where the object differs from what is declared, the
next preview shows it, like any drift.

`pulumi import` and the option `import_` are not used: of a Kubernetes object they take every field
that the API server filled in as an input, and the next preview wants to remove those, or to replace
what cannot be changed (pulumi-kubernetes, provider.go, Read without inputs).
"""

from components.recovery.adopt import adopt
from components.recovery.engine import Engine, RecoveryError
from components.recovery.recover import recover, run_again

__all__ = ["Engine", "RecoveryError", "adopt", "recover", "run_again"]
