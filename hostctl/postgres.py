"""PostgreSQL in a pod: a database dumped and restored, and the verb for a role's password."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hostctl.cluster import Cluster, parse_json
from hostctl.cluster_backup import BACKUP_SECONDS, time_stamp
from hostctl.machine import STATE_DIRECTORY, Machine, Ran
from hostctl.protocol import Failure, Result, say
from hostctl.record import cluster_lock, read_record, write_record
from hostctl.running import kubectl_in_node, running_cluster
from hostctl.spec import (
    DNS_LABEL,
    POSTGRES_NAME,
    POSTGRES_WORKLOAD,
    Value,
    absolute_path,
    checked,
    or_null,
    text_matching,
)
from hostctl.waiting import size_text
from hostctl.workloads import cluster_of, run_kubectl

# PostgreSQL's own default, which RFC 7677 asks for at least.
_SCRAM_ITERATIONS = 4096
PASSWORD_SPEC: dict[str, Any] = {
    "kubeconfig": Value(absolute_path),
    "namespace": Value(DNS_LABEL),
    "workload": Value(POSTGRES_WORKLOAD),
    "container": Value(or_null(DNS_LABEL), None),
    "database": Value(POSTGRES_NAME, "postgres"),
    "user": Value(POSTGRES_NAME),
    "role": Value(POSTGRES_NAME),
    # Others would have to be prepared by RFC 4013, which clients do not all do alike.
    "password": Value(text_matching(r"[ -~]{1,1000}", "printable ASCII"), secret=True),
}
_PSQL = ("psql", "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1")
# The rows that PostgreSQL counted as written in a database, its own catalogs' too; the same text
# whatever the time zone of who asks.
_WRITTEN = (
    "concat_ws('/', datid, extract(epoch from stats_reset), tup_inserted, tup_updated, tup_deleted)"
)
_LOOK = f"""select json_build_object(
    'superuser', (select rolsuper from pg_roles where rolname = current_user),
    'databases', coalesce(json_object_agg(datname, json_build_object(
        'oid', oid::bigint,
        'written', (select {_WRITTEN} from pg_stat_database where datid = oid),
        'encoding', pg_encoding_to_char(encoding),
        'collate', datcollate,
        'ctype', datctype,
        'provider', coalesce(to_jsonb(d)->>'datlocprovider', 'c'),
        'locale', coalesce(to_jsonb(d)->>'datlocale', to_jsonb(d)->>'daticulocale')
    )), '{{}}'))
from pg_database d where datname in (%s)"""
_END_CONNECTIONS = """do $$ begin
    for n in 1..300 loop
        perform pg_stat_clear_snapshot();
        perform pg_terminate_backend(pid) from pg_stat_activity where datname in (%(names)s);
        exit when not found;
        perform pg_sleep(0.1);
    end loop;
end $$"""
# What belongs to the database itself and is in no dump of its content. Values of the settings that
# are lists of names are text of SQL already, which pg_dump's own code treats apart, too.
_TAKE_NAME = """do $$
declare
    was pg_database;
    owner text;
    one record;
    what text;
begin
    select * into was from pg_database where datname = '%(database)s';
    if found then
        owner := pg_get_userbyid(was.datdba);
        execute format('alter database %%I owner to %%I', '%(restored)s', owner);
        execute format('alter database %%I connection limit %%s', '%(restored)s', was.datconnlimit);
        if was.datacl is not null then
            execute format('revoke all on database %%I from public, %%I', '%(restored)s', owner);
        end if;
        for one in select * from aclexplode(was.datacl) loop
            execute format(
                'grant %%s on database %%I to %%s%%s', one.privilege_type, '%(restored)s',
                case one.grantee when 0 then 'public'
                    else quote_ident(pg_get_userbyid(one.grantee)) end,
                case when one.is_grantable then ' with grant option' else '' end);
        end loop;
        for one in
            select setrole, split_part(pair, '=', 1) as name,
                substr(pair, strpos(pair, '=') + 1) as value
            from pg_db_role_setting, unnest(setconfig) pair where setdatabase = was.oid
        loop
            what := case one.setrole when 0 then format('alter database %%I', '%(restored)s')
                else format('alter role %%I in database %%I', pg_get_userbyid(one.setrole),
                    '%(restored)s') end;
            if one.name in ('search_path', 'temp_tablespaces', 'local_preload_libraries',
                'session_preload_libraries') then
                perform set_config(one.name, one.value, true);
                execute format('%%s set %%I from current', what, one.name);
            else
                execute format('%%s set %%I to %%L', what, one.name, one.value);
            end if;
        end loop;
        execute format('alter database %%I rename to %%I', '%(database)s', '%(before)s');
        execute format('alter database %%I allow_connections true', '%(before)s');
    end if;
    execute format('alter database %%I rename to %%I', '%(restored)s', '%(database)s');
    execute format('alter database %%I allow_connections true', '%(database)s');
    if was.oid is not null then
        execute format('comment on database %%I is %%L', '%(database)s',
            shobj_description(was.oid, 'pg_database'));
    end if;
end $$"""


# Dumps


def dump_stamp(path: str) -> str:
    """A dump's time, which is its name: at a target, too."""
    return os.path.basename(path).partition(".dump")[0]


def measure_database(
    machine: Machine, cluster: Cluster, item: Mapping[str, Any], path: str, step: str
) -> tuple[int, float]:
    """The size of a database that is about to be dumped, and since when its counters of written
    rows have not moved. What they were, and the first dump that holds that, is kept in the
    cluster's record."""
    query = (
        f"select pg_database_size(datname), {_WRITTEN} "
        "from pg_stat_database where datname = current_database()"
    )
    text = _psql(machine, cluster, item, item["database"], [query], step)
    size, bar, mark = text.strip().partition("|")
    if not bar or not size.isdigit():
        raise Failure("failed", step, f"psql printed {text[:80]!r}", "run psql by hand")
    written = read_record(machine, cluster.name).get("written") or {}
    if (written.get(item["name"]) or {}).get("mark") != mark:
        one = {"mark": mark, "since": machine.now(), "first": dump_stamp(path)}
        write_record(machine, cluster.name, written={**written, item["name"]: one})
        written = {item["name"]: one}
    return int(size), written[item["name"]]["since"]


def dump_database(
    machine: Machine, cluster: Cluster, item: Mapping[str, Any], path: str, step: str
) -> None:
    """Dumps a database to a file and reads that to its end, by pg_dump and pg_restore of the pod
    itself: always those of the server's version, over its local socket, with no password
    anywhere."""

    def tick(waited: float) -> None:
        say(f"{step}: {waited:.0f} s, {size_text(machine.file_bytes(path))}")

    options: dict[str, Any] = {"timeout": BACKUP_SECONDS, "tick": tick, "ends_with_us": True}
    dump = ["pg_dump", "--format=custom", *_login(item), f"--dbname={item['database']}"]
    _in_pod(machine, cluster, item, dump, step, to_file=path, **options)
    verify = f"verifying the backup of database {item['namespace']}/{item['database']}"
    # Not --list, which reads the beginning alone and is content with a dump that was cut off.
    restore = ["pg_restore", "--file=/dev/null"]
    _in_pod(machine, cluster, item, restore, verify, from_file=path, **options)


# Restores


def restore_to_scratch(
    machine: Machine, cluster: Cluster, item: Mapping[str, Any], path: str, step: str
) -> None:
    """Restores a dump into a database that nobody else has, in the item's PostgreSQL, and drops
    it. It is in the record before it is made, so that :func:`drop_leftovers` drops it even after a
    kill."""
    database = f"homelab_verify_{machine.nonce()}"
    scratch = {key: item[key] for key in ("namespace", "workload", "container", "user")}
    scratch["database"] = database
    # That dropdb knows no --force, before PostgreSQL 13, shows before there is anything to drop.
    _drop_database(machine, cluster, item, database, step)
    with cluster_lock(machine, cluster.name):
        known = read_record(machine, cluster.name).get("scratch") or []
        write_record(machine, cluster.name, scratch=[*known, scratch])
    try:
        _create_database(machine, cluster, item, database, step)
        _fill_database(machine, cluster, item, database, path, step)
    finally:
        _drop_scratch(machine, cluster, scratch, step)


def drop_leftovers(machine: Machine, name: str) -> list[str]:
    """Drops the scratch databases of verifications that were killed, and returns their names. The
    caller holds the lock of backups. One that cannot be dropped now is tried again next time: it is
    no reason to have no backup until then."""
    dropped = []
    for scratch in read_record(machine, name).get("scratch") or []:
        step = f"dropping scratch database {scratch['namespace']}/{scratch['database']}"
        try:
            cluster = running_cluster(machine, name, f"{step} of")
            _drop_scratch(machine, cluster, scratch, step)
        except Failure as failure:
            say(f"{step}: {failure.cause}")
        else:
            dropped.append(f"{scratch['namespace']}/{scratch['database']}")
    return dropped


def restored_before(
    machine: Machine, cluster: Cluster, item: Mapping[str, Any], to: str, step: str
) -> dict[str, Any] | None:
    """What :func:`restore_beside` recorded of the database that an earlier run made, if it is
    there."""
    made = (read_record(machine, cluster.name).get("restored") or {}).get(item["name"])
    there = _look_at(machine, cluster, item, [to], step)["databases"]
    # By its number, which no other has: the name may be another's by now.
    return made if made and to in there and there[to]["oid"] == made["oid"] else None


def restore_beside(
    machine: Machine,
    cluster: Cluster,
    item: Mapping[str, Any],
    to: str,
    origin: Mapping[str, Any],
    replace: bool,
    step: str,
) -> dict[str, Any]:
    """Restores the dump ``origin["from"]`` into a database that is made anew; with ``replace``, one
    of its name is dropped. Returns what is recorded of it: its origin, its `oid`, and whether it is
    `whole`."""
    if replace:
        _drop_database(machine, cluster, item, to, step)
    _create_database(machine, cluster, item, to, step)
    seen = _look_at(machine, cluster, item, [to], step)["databases"][to]
    made = {**origin, "oid": seen["oid"], "whole": False}
    _note_restored(machine, cluster.name, item, made)
    _fill_database(machine, cluster, item, to, origin["from"], step)
    made["whole"] = True
    _note_restored(machine, cluster.name, item, made)
    return made


def _note_restored(
    machine: Machine, name: str, item: Mapping[str, Any], made: Mapping[str, Any]
) -> None:
    with cluster_lock(machine, name):
        known = read_record(machine, name).get("restored") or {}
        write_record(machine, name, restored={**known, item["name"]: made})


def put_in_place(
    machine: Machine,
    cluster: Cluster,
    item: Mapping[str, Any],
    restored: str,
    made: Mapping[str, Any],
    confirmed: bool,
    step: str,
) -> str:
    """Gives the database that :func:`restore_beside` made the name of the item's, which is kept
    under another, and returns that name. Refuses where the item's was written to after the dump,
    or nobody knows, unless that is ``confirmed``; and one of another encoding or collation."""
    database = item["database"]
    there = _look_at(machine, cluster, item, [database, restored], step)["databases"]
    stamp = time_stamp(machine)
    renaming = {key: item[key] for key in ("namespace", "workload", "container", "user")} | {
        "item": item["name"],
        "database": database,
        "restored": restored,
        # At most 63 bytes, and as psql has it without quotes.
        "before": f"{database[:39]}_before_{stamp[:8]}_{stamp[9:15]}",
        "oid": made["oid"],
        "from": made["from"],
        "taken": dump_stamp(made["from"]),
        "confirmed": confirmed,
    }
    _refuse_written(machine, cluster.name, renaming, there, step)
    kinds = ("encoding", "collate", "ctype", "provider", "locale")
    ours = {one: [there[one][kind] for kind in kinds] for one in there}
    if database in ours and ours[database] != ours[restored]:
        cause = f"{database} is of {ours[database]}, {restored} of {ours[restored]}"
        remedy = "make one alike by hand, and restore into it (docs/host.md)"
        raise Failure("refused", step, f"encoding or collation: {cause}", remedy)
    _take_name(machine, cluster.name, renaming, step)
    return database


def finish_rename(machine: Machine, name: str) -> dict[str, Any] | None:
    """Ends what a restore had begun that was killed while it gave a database its name, and returns
    what that was. The caller holds the lock of backups."""
    renaming = read_record(machine, name).get("renaming")
    if renaming:
        step = f"giving {renaming['restored']} the name {renaming['database']}"
        _take_name(machine, name, renaming, step)
    return renaming


def _take_name(machine: Machine, name: str, renaming: Mapping[str, Any], step: str) -> None:
    """Lets a restored database take the name of the one that it was made from, which is kept under
    another. PostgreSQL renames none that somebody is connected to: connections are refused and
    ended first; then both are renamed in one transaction.

    What was begun is in the record, so that :func:`finish_rename` ends it after a kill. The caller
    holds the lock of backups."""
    with cluster_lock(machine, name):
        write_record(machine, name, renaming=dict(renaming))
    cluster = running_cluster(machine, name, f"{step} of")
    names = [renaming[key] for key in ("database", "restored")]
    there = _look_at(machine, cluster, renaming, names, step)["databases"]
    try:
        # By its number, which no other has: a name may be given to another.
        if (there.get(renaming["restored"]) or {}).get("oid") == renaming["oid"]:
            _rename(machine, cluster, renaming, there, step)
    except BaseException:
        _connections(machine, cluster, renaming, there, "true", step)
        with cluster_lock(machine, name):
            write_record(machine, name, renaming=None)
        raise
    before = renaming["before"]
    if _look_at(machine, cluster, renaming, [before], step)["databases"]:
        words = _exec(renaming, ["dropdb", f"--username={renaming['user']}", before])
        say(f"what was in {renaming['database']} is kept in database {before}; once it is of no "
            f"use: kubectl {' '.join(words)}")  # fmt: skip
    with cluster_lock(machine, name):
        known = read_record(machine, name).get("restored") or {}
        left = {item: one for item, one in known.items() if one["oid"] != renaming["oid"]}
        write_record(machine, name, renaming=None, restored=left)


def _rename(
    machine: Machine,
    cluster: Cluster,
    renaming: Mapping[str, Any],
    there: Mapping[str, Any],
    step: str,
) -> None:
    _connections(machine, cluster, renaming, there, "false", step)
    end = _END_CONNECTIONS % {"names": ", ".join(f"'{one}'" for one in there)}
    _psql(machine, cluster, renaming, _elsewhere(renaming), [end], step)
    # Who was connected has now told what it wrote.
    now = _look_at(machine, cluster, renaming, list(there), step)["databases"]
    _refuse_written(machine, cluster.name, renaming, now, step)
    _psql(machine, cluster, renaming, _elsewhere(renaming), [_TAKE_NAME % renaming], step)


def _refuse_written(
    machine: Machine,
    name: str,
    renaming: Mapping[str, Any],
    there: Mapping[str, Any],
    step: str,
) -> None:
    """Refuses to replace a database that somebody wrote to after the backup, or of which that
    cannot be told, unless that is confirmed."""
    now = there.get(renaming["database"])
    if now is None or renaming["confirmed"]:
        return
    last = (read_record(machine, name).get("written") or {}).get(renaming["item"]) or {}
    same = last.get("mark") == now["written"] and "first" in last
    if same and renaming["taken"] >= last["first"]:
        return
    known = "first" in last
    cause = (
        f"{renaming['database']} was written to after the backup of {renaming['taken']}: its "
        "counters of rows are no longer those of then"
        if known
        else f"whether {renaming['database']} was written to after the backup of "
        f"{renaming['taken']} cannot be told: this host's record has no counters of rows of then"
    )
    remedy = (
        f"to put the older one in its place: --in-place --confirm {name}; what is there now is "
        "kept beside it, under another name"
    )
    raise Failure("refused", step, cause, remedy)


# One database


def _look_at(
    machine: Machine, cluster: Cluster, item: Mapping[str, Any], names: Sequence[str], step: str
) -> dict[str, Any]:
    """`databases`: what PostgreSQL knows of each that is there; `superuser`: whether the item's
    role is one."""
    query = _LOOK % ", ".join(f"'{name}'" for name in names)
    return json.loads(_psql(machine, cluster, item, _elsewhere(item), [query], step))


def _create_database(
    machine: Machine, cluster: Cluster, item: Mapping[str, Any], database: str, step: str
) -> None:
    """Makes one that is not there yet, by the item's role, and like the original if that is there:
    a dump's content sorts otherwise in another collation."""
    there = _look_at(machine, cluster, item, [item["database"]], step)["databases"]
    alike = []
    for one in there.values():
        options = {"encoding": "encoding", "lc-collate": "collate", "lc-ctype": "ctype"}
        alike = [f"--{option}={one[key]}" for option, key in options.items()]
    create = ["createdb", *_login(item), "--template=template0", *alike, database]
    try:
        _in_pod(machine, cluster, item, create, step)
    except Failure as failure:
        if failure.code != "failed":
            raise
        remedy = (
            f"role {item['user']} needs CREATEDB (ALTER ROLE ... CREATEDB); a {database} that is "
            f"there goes with --confirm {cluster.name}"
        )
        raise Failure("failed", step, failure.cause, remedy) from None


def _fill_database(
    machine: Machine,
    cluster: Cluster,
    item: Mapping[str, Any],
    database: str,
    path: str,
    step: str,
) -> None:
    # Only a superuser may give an object to another role; else all is the item's role's.
    superuser = _look_at(machine, cluster, item, [database], step)["superuser"]
    owner = [] if superuser else ["--no-owner"]
    restore = ["pg_restore", "--exit-on-error", *_login(item), f"--dbname={database}", *owner]
    _in_pod(machine, cluster, item, restore, step, from_file=path, timeout=BACKUP_SECONDS)


def _connections(
    machine: Machine,
    cluster: Cluster,
    item: Mapping[str, Any],
    there: Mapping[str, Any],
    allow: str,
    step: str,
) -> None:
    alter = [f'alter database "{one}" allow_connections {allow}' for one in there]
    _psql(machine, cluster, item, _elsewhere(item), alter, step)


def _elsewhere(item: Mapping[str, Any]) -> str:
    """The database to be connected to while the item's is renamed, as dropdb chooses it."""
    return "template1" if item["database"] == "postgres" else "postgres"


def _drop_scratch(
    machine: Machine, cluster: Cluster, scratch: Mapping[str, Any], step: str
) -> None:
    _drop_database(machine, cluster, scratch, scratch["database"], step)
    with cluster_lock(machine, cluster.name):
        known = read_record(machine, cluster.name).get("scratch") or []
        write_record(machine, cluster.name, scratch=[one for one in known if one != scratch])


def _drop_database(
    machine: Machine, cluster: Cluster, item: Mapping[str, Any], database: str, step: str
) -> None:
    # By force: a pg_restore that outlived the hostctl that began it may still be connected.
    drop = ["dropdb", "--if-exists", "--force", *_login(item), database]
    _in_pod(machine, cluster, item, drop, step)


# Its programs, in the pod


def _psql(
    machine: Machine,
    cluster: Cluster,
    item: Mapping[str, Any],
    database: str,
    statements: Sequence[str],
    step: str,
) -> str:
    """Runs statements, each in a transaction of its own, and returns what the last one shows."""
    shown = ["--tuples-only", "--no-align"]
    commands = [f"--command={one}" for one in statements]
    psql = [*_PSQL, *shown, *_login(item), f"--dbname={database}", *commands]
    return _in_pod(machine, cluster, item, psql, step).text


def _login(item: Mapping[str, Any]) -> list[str]:
    return ["--no-password", f"--username={item['user']}"]


def _in_pod(
    machine: Machine,
    cluster: Cluster,
    item: Mapping[str, Any],
    argv: Sequence[str],
    step: str,
    **options: Any,
) -> Ran:
    attach = ["--stdin"] if "from_file" in options else []
    return kubectl_in_node(machine, cluster, _exec(item, argv, attach), step, **options)


def _exec(item: Mapping[str, Any], argv: Sequence[str], options: Sequence[str] = ()) -> list[str]:
    container = [f"--container={item['container']}"] if item["container"] else []
    where = [item["workload"], f"--namespace={item['namespace']}", *container]
    return ["exec", *options, *where, "--", *argv]


# Passwords


def postgres_password(machine: Machine, spec: dict[str, Any]) -> Result:
    """Gives a role another password when it is another than when this last ran; what was seen is
    kept on the host, keyed. Where nothing was seen, a database that runs is given it too, since it
    may have another; one that does not run yet is made with it.

    ALTER ROLE goes to psql's stdin, in the pod and over its local socket, with SCRAM's verifier in
    the place of the password: no argument list, and no log of the server either, holds it.
    """
    wanted = checked(spec, PASSWORD_SPEC, "postgres password")
    namespace, path, role = wanted["namespace"], wanted["kubeconfig"], wanted["role"]
    step = f"changing the password of role {role} in {namespace}/{wanted['workload']}"
    place = f"{STATE_DIRECTORY}/passwords/{cluster_of(machine, path)}"
    ledger = f"{place}/{namespace}.{wanted['workload'].replace('/', '.')}.{role}.json"
    with machine.lock(f"password-{namespace}-{role}"):
        try:
            seen = json.loads(machine.read(ledger))
            key, last = seen["key"], seen["last"]
        except (FileNotFoundError, ValueError, KeyError):
            key, last = machine.nonce() + machine.nonce(), None
        digest = hmac.new(key.encode(), wanted["password"].encode(), "sha256").hexdigest()
        changed = last != digest and (last is not None or _runs(machine, wanted, step))
        if changed:
            say(step)
            _alter_role(machine, wanted, step)
        if last != digest:
            machine.make_directory(os.path.dirname(ledger), 0o700)
            content = json.dumps({"key": key, "last": digest}, sort_keys=True).encode()
            machine.write_atomic(ledger, content, 0o600)
    return {"changed": changed}


def _runs(machine: Machine, wanted: dict[str, Any], step: str) -> bool:
    """Whether a pod of the workload is there to be told. `kubectl exec` waits a minute for one."""
    get = ["get", wanted["workload"], f"--namespace={wanted['namespace']}", "--ignore-not-found"]
    seen = run_kubectl(machine, wanted["kubeconfig"], [*get, "--output=json"], step)
    if seen.code:
        raise Failure("failed", step, seen.complaint, "nothing was changed: run pulumi up again")
    if not seen.out.strip():
        return False
    status = parse_json(seen.out, step).get("status") or {}
    return bool(status.get("readyReplicas")) or status.get("phase") == "Running"


def _alter_role(machine: Machine, wanted: dict[str, Any], step: str) -> None:
    salt = bytes.fromhex(machine.nonce())
    sql = f"ALTER ROLE \"{wanted['role']}\" PASSWORD '{scram_verifier(wanted['password'], salt)}';"
    psql = [*_PSQL, *_login(wanted), f"--dbname={wanted['database']}"]
    arguments = _exec(wanted, psql, ["--stdin"])
    ran = run_kubectl(machine, wanted["kubeconfig"], arguments, step, input=f"{sql}\n".encode())
    if ran.code:
        # Not all that psql says, which may quote what it was given.
        said = ran.err.decode("utf-8", "replace")
        found = re.search(r"(?:ERROR|FATAL|Error|error)\b[^\n']*", said)
        raise Failure(
            "failed",
            step,
            found.group(0)[:300] if found else f"psql ended with {ran.code}",
            "nothing was changed: correct the Secret's `postgres`, or start the workload, and run "
            "pulumi up again",
        )


def scram_verifier(password: str, salt: bytes) -> str:
    """What PostgreSQL stores of a password (RFC 5803), which it takes in its place."""
    salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, _SCRAM_ITERATIONS)
    client = hmac.new(salted, b"Client Key", "sha256").digest()
    parts = hashlib.sha256(client).digest(), hmac.new(salted, b"Server Key", "sha256").digest()
    stored, server = (base64.b64encode(part).decode() for part in parts)
    return f"SCRAM-SHA-256${_SCRAM_ITERATIONS}:{base64.b64encode(salt).decode()}${stored}:{server}"
