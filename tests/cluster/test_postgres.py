"""Backups of a database of a real PostgreSQL, which hostctl reaches as it does on a host: by
`docker exec` and `kubectl exec`, over the local socket of the pod.
"""

import json
import time
from typing import Any

import pytest

from tests.cluster.host import Host

pytestmark = pytest.mark.cluster

NODE = "k3d-factory-server-0"
KUBECONFIG = "/etc/k3d/kubeconfig"
ROOT = "/var/lib/images/postgres-15"
WORKLOAD = "statefulset/skillai-db"
ITEM = {
    "name": "skillai",
    "kind": "postgres",
    "namespace": "factory",
    "workload": WORKLOAD,
    "database": "skillai",
    "user": "skillai",
}
NAS = {"name": "nas", "kind": "directory", "repository": "/mnt/nas/restic", "keep_last": 3}
SPEC: dict[str, Any] = {"cluster": "factory", "items": [ITEM], "targets": [NAS]}
LABELS = {"app": "skillai-db"}
OBJECTS: list[dict[str, Any]] = [
    {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "factory"}},
    {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"namespace": "factory", "name": "skillai-db"},
        "spec": {
            "selector": {"matchLabels": LABELS},
            "serviceName": "skillai-db",
            "template": {
                "metadata": {"labels": LABELS},
                "spec": {"containers": [{"name": "postgres", "image": "postgres:15"}]},
            },
        },
    },
]
# As the official image begins: trust at the socket, the database's user a superuser.
START = f"""
mount --bind /dev {ROOT}/dev; mount -t proc proc {ROOT}/proc
chroot {ROOT} chown -R 999:999 /run/postgresql /var/lib/postgresql /tmp
as() {{ chroot {ROOT} su postgres -c "$1"; }}
as "initdb --pgdata=/var/lib/postgresql/data --username=skillai --auth-local=trust \
    --auth-host=scram-sha-256 --encoding=UTF8 --locale=C.UTF-8 --no-sync" >/dev/null
as "pg_ctl --pgdata=/var/lib/postgresql/data --wait --silent --log=/tmp/log start -o '-c fsync=off \
    -c listen_addresses=127.0.0.1 -c log_statement=all -c unix_socket_directories=/run/postgresql'"
as "createdb --username=skillai --host=/run/postgresql skillai"
"""
CONTENT = r"""
create table "Ünï ""quoted"" table" (
    id serial primary key, text text, bytes bytea, doc jsonb, at timestamptz, many int[],
    twice numeric generated always as (id * 2.5) stored
);
insert into "Ünï ""quoted"" table" (text, bytes, doc, at, many) values
    (E'line\nbreak\ttab\\ back''slash', '\x00ff0a0d1a', '{"a": "\u00e9 ☃"}', 'epoch', '{1,null}'),
    ('\.', '', 'null', 'infinity', '{}'),
    ('$$; drop table x; --', null, null, null, null);
insert into "Ünï ""quoted"" table" (text)
    select repeat(md5(n::text), 20) from generate_series(1, 3000) n;
create view seen as select count(*) from "Ünï ""quoted"" table";
create function f() returns text language sql as $f$ select $$'quoted' \$$ $f$;
create table empty ();
select lo_from_bytea(4242, '\xdeadbeef');
comment on table empty is E'it''s\nempty';
"""
LOOK = r"""
select md5(string_agg(t::text, '|' order by id)), min(twice) from "Ünï ""quoted"" table" t;
select * from seen; select f(); select encode(lo_get(4242), 'hex');
select nextval('"Ünï ""quoted"" table_id_seq"');
select obj_description('empty'::regclass);
"""


def psql(host: Host, sql: str, database: str = "skillai") -> str:
    """What psql prints, in the pod itself."""
    words = ["psql", "--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--username=skillai"]
    words += [f"--dbname={database}", "--set=ON_ERROR_STOP=1"]
    command = ["exec", "-i", WORKLOAD, "--namespace=factory", "--", *words]
    return host.kubectl(*command, input=sql)


def databases(host: Host) -> set[str]:
    query = "select datname from pg_database where not datistemplate"
    return set(psql(host, query, "postgres").split())


def sh(host: Host, script: str) -> str:
    return host.engine.run(["sh", "-ec", script]).stdout


def put_aside(host: Host, program: str, script: str) -> None:
    """Another program in the place of one of the image's; it may run `program.real`."""
    target = f"/bin/{program}"
    text = f"#!/bin/sh\n{script}\n"
    move = f"cd {ROOT}/bin; [ -e {program}.real ] || mv {program} {program}.real; cat > {program}"
    host.engine.docker(
        "exec", "-i", NODE, "sh", "-ec", f"{move}; chmod +x .{target[4:]}", input=text
    )


def put_back(host: Host, program: str) -> None:
    host.engine.docker("exec", NODE, "sh", "-ec", f"cd {ROOT}/bin; mv {program}.real {program}")


@pytest.fixture
def postgres(host: Host, spec: dict[str, Any], network: str) -> Host:
    """A cluster with a StatefulSet whose pod is a real PostgreSQL with data, and a target."""
    host.done("k3d", "ensure", spec={**spec, "generation": 1})
    pack = ["tar", "-C", str(host.engine.rig.postgres), "-c", "."]
    unpack = ["docker", "exec", "-i", NODE, "sh", "-ec", f"mkdir -p {ROOT}; tar -x -C {ROOT}"]
    host.pipe(pack, into=unpack)
    host.engine.docker("exec", NODE, "sh", "-ec", START)
    listed = {"apiVersion": "v1", "kind": "List", "items": OBJECTS}
    host.kubectl("apply", "--filename=-", input=json.dumps(listed))
    host.kubectl("wait", "--for=jsonpath={.status.readyReplicas}=1", "--timeout=60s",
                 "--namespace=factory", WORKLOAD)  # fmt: skip
    psql(host, CONTENT)
    key = {"path": "/var/lib/homelab/backups/factory/nas.password", "content": "made-up-password"}
    owned = {"mode": "0600", "owner": "root", "group": "root"}
    host.done("files", "write", spec=key | owned)
    sh(host, "mkdir -p /mnt/nas")
    return host


def test_a_database_is_dumped_proved_and_restored_and_a_damaged_dump_is_no_backup(
    postgres: Host,
) -> None:
    host = postgres
    before = databases(host)
    stale = {**SPEC, "items": [{**ITEM, "stale_after_hours": 1}], "targets": [], "keep": 3}
    host.done("backup", "run", spec=stale)
    record = "/var/lib/homelab/clusters/factory.json"
    content = json.loads(sh(host, f"cat {record}"))
    content["written"]["skillai"]["since"] -= 2 * 3600
    host.engine.run(["tee", record], input=json.dumps(content))
    cause = host("backup", "run", spec=stale)["error"]["cause"]
    assert "nobody has written to it for 2 h, allowed are 1" in cause
    psql(host, "create table late (n int); insert into late values (1)")
    host.done("backup", "run", spec=stale)

    taken = host.done("backup", "run", spec={**SPEC, "keep": 3})["items"]["skillai"]
    assert sh(host, f"head -c 5 {taken['file']}") == "PGDMP"

    verified = host.done("backup", "verify", spec=SPEC)["verified"]["nas"]["skillai"]
    assert verified["bytes"] == taken["bytes"]
    assert databases(host) == before

    # Whole at first sight, and cut off: what pg_restore --list is content with.
    put_aside(host, "pg_dump", 'pg_dump.real "$@" | head -c 20000')
    error = host("backup", "run", spec={**SPEC, "keep": 3})["error"]
    assert error["code"] == "failed"
    assert "could not read from input file" in error["cause"]
    put_back(host, "pg_dump")
    listed = host.done("backup", "list", spec={"name": "factory"})["items"]["skillai"]
    assert listed[0]["file"] == taken["file"]

    # The pod's data is newer now; the backup comes back beside it, and over nothing.
    then = psql(host, LOOK)
    psql(host, """delete from "Ünï ""quoted"" table"; select lo_unlink(4242); drop view seen""")
    restore = {**SPEC, "item": "skillai", "target": "nas"}
    assert host.done("backup", "restore", spec=restore)["restored"] == "skillai_restored"
    assert psql(host, LOOK, "skillai_restored") == then
    assert psql(host, """select count(*) from "Ünï ""quoted"" table" """) == "0"
    again = host("backup", "restore", spec=restore)["error"]
    assert 'database "skillai_restored" already exists' in again["cause"]
    assert "--confirm factory" in again["remedy"]
    psql(host, "drop table empty", "skillai_restored")
    host.done("backup", "restore", spec={**restore, "confirm": "factory"})
    assert psql(host, LOOK, "skillai_restored") == then

    # One that was damaged where it lies.
    sh(host, f"truncate -s -100 {taken['file']}")
    damaged = host("backup", "restore", spec={**restore, "target": None, "confirm": "factory"})
    assert "the checksum of" in damaged["error"]["cause"]
    assert psql(host, LOOK, "skillai_restored").count("\n") == then.count("\n")


# What is set on a database itself, and is in no dump of its content.
SETTINGS = r"""
create role app login; create role "we.Ird";
alter database skillai owner to app; revoke all on database skillai from public;
grant connect on database skillai to "we.Ird" with grant option;
alter database skillai set search_path to public, "$user", '';
alter database skillai set "my.own" to 'a, ''b';
alter database skillai set timezone to 'Asia/Tokyo';
alter role app in database skillai set work_mem to '8MB';
alter database skillai connection limit 17; comment on database skillai is 'it''s ours';
create table apps (n int); alter table apps owner to app; revoke all on apps from skillai;
grant select on apps to "we.Ird";
"""
SET = """
select pg_get_userbyid(datdba), datacl, datconnlimit, datallowconn, datcollate,
    shobj_description(oid, 'pg_database'),
    (select array_agg(setrole::text || setconfig::text order by setrole)
        from pg_db_role_setting where setdatabase = oid)
from pg_database where datname = '%s'
"""
APPS = "select relowner::regrole, relacl from pg_class where relname = 'apps'"


def in_the_background(host: Host, sql: str, database: str) -> None:
    words = f"chroot {ROOT} psql --host=/run/postgresql --username=skillai --dbname={database}"
    script = f'{words} --command="$1" > {ROOT}/tmp/{database}.said 2>&1'
    host.engine.docker("exec", "--detach", NODE, "sh", "-c", script, "sh", sql)


def until(host: Host, sql: str) -> str:
    """What a query shows, once it shows something."""
    for _ in range(300):
        shown = psql(host, sql, "postgres").strip()
        if shown:
            return shown
        time.sleep(0.2)
    raise AssertionError(f"nothing after 60 s: {sql}")


def test_a_restored_database_takes_the_originals_name_whole_also_when_killed_between_the_renames(
    postgres: Host,
) -> None:
    host = postgres
    # What it writes by itself would be counted, too.
    psql(host, "alter system set autovacuum = off")
    psql(host, "select pg_reload_conf()")
    psql(host, SETTINGS)
    host.done("backup", "run", spec={**SPEC, "keep": 3})
    then, apps, settings = psql(host, LOOK), psql(host, APPS), psql(host, SET % "skillai")
    psql(host, """delete from "Ünï ""quoted"" table"; create table newer ()""")
    restore = {**SPEC, "item": "skillai", "target": "nas"}
    assert host.done("backup", "restore", spec=restore)["restored"] == "skillai_restored"
    restore |= {"in_place": True}
    error = host("backup", "restore", spec=restore)["error"]
    assert "skillai was written to after the backup of" in error["cause"]
    assert psql(host, "select count(*) from newer") == "0"

    # Another session has the second one locked: PostgreSQL waits after the first renaming.
    in_the_background(host, "begin; comment on database skillai_restored is 'x'; "
                      "select pg_sleep(1000)", "postgres")  # fmt: skip
    until(host, "select pid from pg_stat_activity where wait_event = 'PgSleep'")
    taking = host.begin("backup", "restore", spec={**restore, "confirm": "factory"})
    with taking:
        waits = "select pid from pg_stat_activity where wait_event_type = 'Lock'"
        pid = until(host, waits)
        locks = f"""select datname, granted from pg_locks join pg_database d on objid = d.oid
            where pid = {pid} and classid = 1262 and mode = 'AccessExclusiveLock' order by 2"""
        assert psql(host, locks, "postgres").split() == ["skillai_restored|f", "skillai|t"]
        taking.kill()
    # As a power cut would: the server's process, and with it all that was not committed.
    host.engine.docker("exec", NODE, "sh", "-ec", f"kill -9 {pid}")
    ready = f"sleep 1; until chroot {ROOT} pg_isready --host=/run/postgresql; do sleep 0.2; done"
    host.engine.docker("exec", NODE, "sh", "-ec", ready)
    assert {"skillai", "skillai_restored"} == databases(host) - {"postgres"}
    assert "not currently accepting connections" in said_of(host, "skillai")

    assert host.done("backup", "restore", spec=restore)["restored"] == "skillai"
    (before,) = databases(host) - {"skillai", "postgres"}
    assert psql(host, "select count(*) from newer", before) == "0"
    assert f"dropdb --username=skillai {before}" in host.said
    assert psql(host, LOOK) == then
    assert psql(host, APPS) == apps
    assert psql(host, SET % "skillai") == psql(host, SET % before) == settings

    # Nobody wrote since this one, though somebody is connected.
    host.done("backup", "run", spec={**SPEC, "keep": 3})
    in_the_background(host, "select pg_sleep(1000)", "skillai")
    until(host, "select pid from pg_stat_activity where wait_event = 'PgSleep'")
    assert host.done("backup", "restore", spec=restore)["restored"] == "skillai"
    assert len(databases(host)) == 4
    assert psql(host, SET % "skillai") == settings
    said = host.engine.docker("exec", NODE, "cat", f"{ROOT}/tmp/skillai.said")
    assert "terminating connection due to administrator command" in said
    # With no name: gone, as dropdb leaves it.
    psql(host, "drop database skillai with (force)", "postgres")
    assert host.done("backup", "restore", spec=restore)["restored"] == "skillai"
    assert psql(host, APPS) == apps


def said_of(host: Host, database: str) -> str:
    words = f"chroot {ROOT} psql --host=/run/postgresql --username=skillai --dbname={database}"
    return sh(host, f"docker exec {NODE} {words} --command='select 1' 2>&1 || true")


def test_a_killed_verification_leaves_a_database_that_the_next_run_drops(postgres: Host) -> None:
    """And it takes nobody else's: one by its former name, and one of a full length, stay."""
    host = postgres
    theirs = {"skillai_verify", f"homelab_verify_{'0' * 16}", "x" * 63}
    for name in theirs:
        psql(host, f"create database {name}")
    host.done("backup", "run", spec={**SPEC, "keep": 3})
    put_aside(host, "pg_restore", "cat > /dev/null; echo $$ > /tmp/began; exec sleep 1000")
    verify = host.begin("backup", "verify", spec=SPEC)
    with verify:
        host.engine.docker(
            "exec", NODE, "sh", "-ec", f"until [ -s {ROOT}/tmp/began ]; do sleep 0.1; done"
        )
        verify.kill()
    put_back(host, "pg_restore")
    (left,) = databases(host) - theirs - {"skillai", "postgres"}
    # What it began goes on, and holds the lock, as long as the pod's program runs.
    host.engine.docker("exec", NODE, "sh", "-ec", f"kill $(cat {ROOT}/tmp/began)")
    recovered = host.done("backup", "recover", spec={"name": "factory"})["recovered"]
    assert recovered == [f"factory/{left}"]
    assert databases(host) == theirs | {"skillai", "postgres"}
    host.done("backup", "verify", spec=SPEC)
    assert databases(host) == theirs | {"skillai", "postgres"}

    # PostgreSQL 12: what could not be dropped is not made.
    put_aside(host, "dropdb", """echo "dropdb: unrecognized option '--force'" >&2; exit 1""")
    error = host("backup", "verify", spec=SPEC)["error"]
    put_back(host, "dropdb")
    assert "unrecognized option" in error["cause"]
    assert databases(host) == theirs | {"skillai", "postgres"}


def test_another_password_of_a_role_is_in_the_database_and_in_no_log(postgres: Host) -> None:
    host = postgres
    old, new = "made-up old 'password'", 'made-up new "\\$password'
    psql(host, f"""create role "app.Role" login password '{old.replace("'", "''")}'""")
    written = {"cluster": "factory", "path": KUBECONFIG, "owner": "root", "group": "root"}
    host.done("kubeconfig", spec={**written, "mode": "0600", "server": "https://127.0.0.1:6443"})
    role = {
        "kubeconfig": KUBECONFIG,
        "namespace": "factory",
        "workload": WORKLOAD,
        "role": "app.Role",
        "user": "skillai",
    }

    def logs_in(password: str) -> bool:
        words = ["chroot", ROOT, "psql", "--no-psqlrc", "--host=127.0.0.1", "--username=app.Role"]
        command = [
            "docker",
            "exec",
            f"--env=PGPASSWORD={password}",
            NODE,
            *words,
            "--dbname=skillai",
        ]
        return host.engine.run([*command, "--command=select 1"], check=False).returncode == 0

    def give(password: str) -> dict[str, Any]:
        return host("postgres", "password", spec={**role, "password": password})

    # A database that was never seen may have another: it is told.
    psql(host, """alter role "app.Role" password 'made-up other'""")
    assert give(old)["changed"]
    assert not give(old)["changed"]
    assert logs_in(old)
    # What cannot be told changes nothing, and is tried again.
    put_aside(host, "psql", "echo 'psql: error: FATAL:  no' >&2; exit 2")
    assert give(new)["error"]["cause"].endswith("FATAL:  no")
    put_back(host, "psql")
    assert logs_in(old)

    assert give(new)["changed"]
    said = host.said
    assert (logs_in(old), logs_in(new)) == (False, True)
    assert not give(new)["changed"]
    log = host.engine.docker("exec", NODE, "cat", f"{ROOT}/tmp/log")
    assert 'ALTER ROLE "app.Role" PASSWORD' in log  # as log_statement=all has it
    ledgers = sh(host, "cat /var/lib/homelab/passwords/*/*")
    for text in (log, said, ledgers):
        assert new not in text
