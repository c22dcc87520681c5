"""hostctl with one safeguard taken out, for each incident's test: that test must then fail.

`make mutants` runs each mutant's test against it and names those that no test noticed. Wanted ones
are named on the command line: `make mutants MUTANTS="no-lock"`.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

_VARIABLE = "HOMELAB_MUTANT"
_TESTS = Path(__file__).with_name("test_incidents.py")


class Mutant(NamedTuple):
    """``old`` stands once in the shipped program and becomes ``new``; ``test``, a test of
    test_incidents.py with the id of its parameters, shall notice.
    """

    test: str
    old: str
    new: str


MUTANTS = {
    "no-wait-for-the-bind-address": Mutant(
        "test_incident_01_the_api_is_published_although_its_address_comes_up_after_docker",
        '    if down or not api["published"]:\n        wait_for_address(machine, api["bind"])\n',
        "",
    ),
    "a-load-balancer-before-one-server": Mutant(
        "test_incident_01_the_api_is_published_although_its_address_comes_up_after_docker",
        '    single = spec["servers"] == 1\n',
        "    single = False\n",
    ),
    "a-start-that-fails-is-none": Mutant(
        "test_incident_01_a_node_whose_port_is_taken_is_named_and_healed",
        'run_tool(machine, ["docker", "start", name], f"starting {name}", "failed", timeout=300.0)',
        'attempt(machine, ["docker", "start", name], f"starting {name}", timeout=300.0)',
    ),
    "restarts-without-bound": Mutant(
        "test_incident_02_recovery_restarts_a_bounded_number_of_times_and_deletes_nothing",
        "            if restarts == STALL_RESTARTS:\n",
        "            if False:\n",
    ),
    "a-failed-create-is-rolled-back": Mutant(
        "test_incident_02_a_create_that_fails_is_kept_and_continued",
        '"--config", config, "--no-rollback"]',
        '"--config", config]',
    ),
    "a-killed-create-is-not-continued": Mutant(
        "test_incident_02_a_create_that_is_killed_is_continued_and_never_rolled_back"
        "[container create-k3d]",
        "    if not begun:\n        return cluster\n",
        "    return cluster\n",
    ),
    "k3d-does-not-keep-the-lock": Mutant(
        "test_incident_02_a_create_that_is_killed_is_continued_and_never_rolled_back"
        "[volume create-hostctl]",
        "pass_fds=self._locks",
        "pass_fds=()",
    ),
    "no-lock": Mutant(
        "test_incident_02_two_ensures_at_once_make_one_cluster",
        '    return machine.lock(f"cluster-{name}")\n',
        "    return contextlib.nullcontext()\n",
    ),
    "a-lost-endpoint-is-fine": Mutant(
        "test_incident_03_a_cluster_whose_node_lost_its_network_is_not_absent",
        '        if lost and network != "host":\n',
        "        if False:\n",
    ),
    "an-exit-status-counts-for-nothing": Mutant(
        "test_incident_03_a_docker_that_does_not_answer_is_not_an_absent_cluster",
        "        return machine.run(argv, **options)\n    except ToolMissing:\n",
        "        return machine.run(argv, **options)._replace(code=0)\n    except ToolMissing:\n",
    ),
    "remains-are-nothing": Mutant(
        "test_incident_03_half_a_cluster_is_named_and_left_alone",
        "        _refuse_remains(machine, cluster, found)\n        return cluster\n",
        "        return cluster\n",
    ),
    "anybody-s-container-is-ours": Mutant(
        "test_incident_03_a_cluster_of_someone_else_with_this_name_is_left_alone",
        "    refuse_foreign(name, found)\n    nodes = ",
        "    nodes = ",
    ),
    "reading-is-no-progress": Mutant(
        "test_incident_04_a_server_that_reads_its_datastore_is_left_in_peace",
        "        if total is None or total - read >= STALL_BYTES or total < read:\n",
        "        if total is None:\n",
    ),
    "a-stalled-server-is-left-alone": Mutant(
        "test_incident_04_a_server_that_stalls_is_restarted",
        "        elif now - moved >= STALL_SECONDS:\n",
        "        elif False:\n",
    ),
    "other-resolvers-are-not-seen": Mutant(
        "test_incident_06_an_edit_of_what_is_fixed_is_shown_and_refused[incident-05-resolvers]",
        '        compare("resolvers", spec["resolvers"], live["resolvers"])\n',
        "        pass\n",
    ),
    "another-storage-directory-is-not-seen": Mutant(
        "test_incident_06_an_edit_of_what_is_fixed_is_shown_and_refused[incident-06-storage]",
        '    compare("storageDir", spec["storage_dir"], live["storage_dir"])\n',
        "",
    ),
    "resolvers-on-a-bridge-are-fine": Mutant(
        "test_incident_05_resolvers_inside_a_docker_network_are_refused",
        '        if fixed or cluster.state == "absent":\n'
        "            refuse_docker_resolvers(machine, spec)\n",
        "",
    ),
    "latest-is-a-pin": Mutant(
        "test_incident_09_an_image_without_a_pin_is_refused",
        'r"(?!.*:latest(@|$))(',
        'r"(',
    ),
    "a-recreate-without-the-name": Mutant(
        "test_incident_10_a_recreate_needs_the_name_and_makes_a_backup_that_restores",
        '    return spec["recreate"] == spec["name"] and not _beyond_recreate(fixed)\n',
        "    return True\n",
    ),
    "no-look-at-the-room": Mutant(
        "test_incident_11_a_full_disk_refuses_a_recreate_and_harms_nothing",
        "    free = machine.free_bytes(target)\n",
        "    free = needed\n",
    ),
    "volumes-with-a-name-are-orphans": Mutant(
        "test_incident_11_cleaning_takes_what_nothing_references_and_nothing_else",
        "        if not _is_anonymous(facts):\n            continue\n",
        "",
    ),
    "a-seed-is-applied": Mutant(
        "test_incident_08_a_secret_that_the_cluster_rotated_is_not_written_again",
        '    arguments = ["create", f"--field-manager={FIELD_MANAGER}", "--filename=-",'
        ' "--output=name"]\n',
        '    arguments = ["apply", "--server-side", "--force-conflicts", "--filename=-",'
        ' "--output=name"]\n',
    ),
    "the-bind-address-is-the-server-s": Mutant(
        "test_incident_14_the_kubeconfig_names_a_server_that_clients_reach",
        '        f"    server: {server}\\n"\n',
        '        f"    server: https://0.0.0.0:6443\\n"\n',
    ),
    "a-secret-that-fails-is-passed-over": Mutant(
        "test_incident_17_a_secret_that_cannot_be_applied_fails_the_run_and_names_the_remedy",
        '    if "(AlreadyExists)" in said:\n',
        "    if said:\n",
    ),
}


def mutated(text: str) -> str:
    """The shipped program, or the mutant of it that the environment asks for."""
    name = os.environ.get(_VARIABLE)
    if not name:
        return text
    mutant = MUTANTS[name]
    if text.count(mutant.old) != 1:
        raise LookupError(f"mutant {name}: its text stands {text.count(mutant.old)} times")
    return text.replace(mutant.old, mutant.new)


def _survives(name: str) -> bool:
    """Whether the mutant's test passes. A test that cannot run is an error, not a survivor."""
    argv = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    argv.append(f"{_TESTS}::{MUTANTS[name].test}")
    done = subprocess.run(
        argv, env={**os.environ, _VARIABLE: name}, capture_output=True, text=True, check=False
    )
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    if not re.search(r"1 (passed|failed)", last) or "error" in last:
        raise SystemExit(f"mutant {name}: its test did not run\n{done.stdout}\n{done.stderr}")
    return done.returncode == 0


def main(names: list[str]) -> int:
    """Runs the mutants' tests; the number of mutants that survive."""
    unknown = sorted(set(names) - MUTANTS.keys())
    if unknown:
        raise SystemExit(f"no such mutant: {', '.join(unknown)}; there are {', '.join(MUTANTS)}")
    survivors = []
    for name in names or MUTANTS:
        began = time.monotonic()
        survives = _survives(name)
        survivors += [name] if survives else []
        seconds = time.monotonic() - began
        print(f"{'SURVIVED' if survives else 'killed':8} {name} ({seconds:.0f} s)", flush=True)
    print(f"mutants: {len(names or MUTANTS)}, {len(survivors)} survived {' '.join(survivors)}")
    return len(survivors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
