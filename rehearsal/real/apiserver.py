"""A real API server, asked as pulumi-kubernetes asks it.

urllib3 and not the package `kubernetes`: its client leaves the client's key in files below /tmp
until an orderly exit, which no plugin has, and its discovery is shared by no two threads.
"""

from __future__ import annotations

import base64
import json
import ssl
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

import urllib3

from rehearsal.apiserver import ApiError, Object, Resource, copied, headless, taken_over
from rehearsal.core import Failure

_SECONDS = urllib3.Timeout(connect=5, read=60)
_DELETE_SECONDS = 600.0
_POLL_SECONDS = 0.2


class RealApiServer:
    """The API server of a kubeconfig's cluster, as its user; an :class:`rehearsal.apiserver.Api`.

    Raises :class:`Unreachable` when it does not answer.
    """

    def __init__(self, cluster: Object, user: Object) -> None:
        self._server = cluster["server"].rstrip("/")
        self._headers = {"Accept": "application/json"}
        if user.get("token"):
            self._headers["Authorization"] = f"Bearer {user['token']}"
        context = _context(cluster, user)
        self._http = urllib3.PoolManager(maxsize=16, ssl_context=context, retries=False)
        self._served: dict[str, dict[str, Resource]] = {}
        self._lock = threading.Lock()
        self._ask("GET", "/version")

    # Objects

    def resource(self, api_version: str, kind: str) -> Resource:
        with self._lock:
            known = self._served.get(api_version, {})
        if kind not in known:
            group = api_version.rpartition("/")[0]
            prefix = "/apis" if group else "/api"
            try:
                listed = self._ask("GET", f"{prefix}/{api_version}")["resources"]
            except ApiError as error:
                if error.reason != "NotFound":
                    raise
                listed = []
            known = {
                one["kind"]: Resource(group, one["kind"], one["name"], one["namespaced"])
                for one in listed
                if "/" not in one["name"]
            }
            with self._lock:
                self._served[api_version] = known
        if kind not in known:
            raise ApiError("NoMatch", f'no matches for kind "{kind}" in version "{api_version}"')
        return known[kind]

    def get(self, obj: Object) -> Object:
        return self._ask("GET", self._path(obj))

    def create(self, obj: Object, manager: str, dry_run: bool = False) -> Object:
        return self._ask(
            "POST", self._path(obj, named=False), obj, fieldManager=manager, dryRun=dry_run
        )

    def apply(self, obj: Object, manager: str, force: bool, dry_run: bool = False) -> Object:
        return self._ask(
            "PATCH",
            self._path(obj),
            obj,
            "application/apply-patch+yaml",
            fieldManager=manager,
            force="true" if force else "false",
            dryRun=dry_run,
        )

    def replace(self, obj: Object, manager: str, dry_run: bool = False) -> Object:
        obj = copied(obj)
        obj["metadata"]["resourceVersion"] = self.get(obj)["metadata"]["resourceVersion"]
        return self._ask("PUT", self._path(obj), obj, fieldManager=manager, dryRun=dry_run)

    def take_over(self, obj: Object, managers: set[tuple[str, str]], manager: str) -> None:
        live = self.get(obj)
        managed = taken_over(live, managers, manager)
        if managed is not None:
            version = live["metadata"]["resourceVersion"]
            values = {"managedFields": managed, "resourceVersion": version}
            patch = [
                {"op": "replace", "path": f"/metadata/{name}", "value": value}
                for name, value in values.items()
            ]
            self._ask("PATCH", self._path(live), patch, "application/json-patch+json")

    def delete(self, obj: Object) -> bool:
        """Deletes in the foreground and waits until the object is gone."""
        try:
            uid = self.get(obj)["metadata"]["uid"]
            options = {"propagationPolicy": "Foreground", "preconditions": {"uid": uid}}
            self._ask("DELETE", self._path(obj), options)
        except ApiError as error:
            if error.reason == "NotFound":
                return False
            raise
        until = time.monotonic() + _DELETE_SECONDS
        while self._is_there(obj, uid):
            if time.monotonic() >= until:
                name = obj["metadata"]["name"]
                raise Failure(f"'{name}' timed out waiting to be deleted")
            time.sleep(_POLL_SECONDS)
        return True

    def _is_there(self, obj: Object, uid: str) -> bool:
        try:
            return self.get(obj)["metadata"]["uid"] == uid
        except ApiError as error:
            if error.reason == "NotFound":
                return False
            raise

    def ready(self, obj: Object, waited: float) -> bool:
        try:
            live = self.get(obj)
        except ApiError as error:
            if error.reason == "NotFound":
                return False
            raise
        status, spec = live.get("status", {}), live.get("spec", {})
        kind = live["kind"]
        if status.get("observedGeneration", 0) < live["metadata"].get("generation", 0) and (
            kind in ("DaemonSet", "Deployment", "StatefulSet")
        ):
            return False
        if kind == "Deployment":
            wanted = spec.get("replicas", 1)
            return _condition(live, "Available") and (
                status.get("updatedReplicas", 0) == status.get("replicas", 0) == wanted
            )
        if kind == "StatefulSet":
            wanted = spec.get("replicas", 1)
            updated = status.get("currentRevision") == status.get("updateRevision")
            return updated and status.get("readyReplicas", 0) == wanted
        if kind == "DaemonSet":
            wanted = status.get("desiredNumberScheduled", 0)
            return status.get("updatedNumberScheduled", 0) == wanted and (
                status.get("numberAvailable", 0) == wanted
            )
        if kind == "Job":
            return _condition(live, "Complete")
        if kind == "Pod":
            return status.get("phase") == "Succeeded" or _condition(live, "Ready")
        if kind == "Secret":
            # The controller manager fills in the tokens of service accounts.
            filled = live.get("type") != "kubernetes.io/service-account-token"
            return filled or bool((live.get("data") or {}).get("token"))
        if kind == "ResourceQuota":
            return status.get("hard") == spec.get("hard")
        if kind == "PersistentVolumeClaim":
            return status.get("phase") == "Bound"
        if kind == "PersistentVolume":
            return status.get("phase") in ("Available", "Bound")
        if kind == "Ingress" or spec.get("type") == "LoadBalancer":
            return bool(status.get("loadBalancer", {}).get("ingress"))
        if kind == "Service" and spec.get("type") != "ExternalName" and not headless(live):
            return not spec.get("selector") or self._has_endpoints(live)
        return True

    def _has_endpoints(self, service: Object) -> bool:
        metadata = service["metadata"]
        slices = self._ask(
            "GET",
            f"/apis/discovery.k8s.io/v1/namespaces/{metadata['namespace']}/endpointslices",
            labelSelector=f"kubernetes.io/service-name={metadata['name']}",
        )
        return any(
            endpoint.get("conditions", {}).get("ready")
            for one in slices["items"]
            for endpoint in one.get("endpoints") or []
        )

    # HTTP

    def _path(self, obj: Object, named: bool = True) -> str:
        resource = self.resource(obj["apiVersion"], obj["kind"])
        metadata = obj["metadata"]
        prefix = "/apis" if resource.group else "/api"
        path = f"{prefix}/{obj['apiVersion']}"
        if resource.namespaced:
            path += f"/namespaces/{metadata.get('namespace') or 'default'}"
        path += f"/{resource.plural}"
        return f"{path}/{metadata['name']}" if named else path

    def _ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        content: str = "application/json",
        **query: str | bool,
    ) -> Any:
        given: Mapping[str, str] = {
            name: "All" if value is True else value for name, value in query.items() if value
        }
        url = f"{self._server}{path}" + (f"?{urlencode(given)}" if given else "")
        headers = self._headers | ({"Content-Type": content} if body is not None else {})
        sent = None if body is None else json.dumps(body).encode()
        try:
            answer = self._http.request(method, url, body=sent, headers=headers, timeout=_SECONDS)
        except urllib3.exceptions.HTTPError as error:
            raise Unreachable(f'{method.capitalize()} "{url}": {error}') from None
        if answer.status < 300:
            return json.loads(answer.data)
        try:
            status = json.loads(answer.data)
            details = status.get("details") or {}
            reason, message = status["reason"], status["message"]
        except (ValueError, KeyError):
            details = {}
            reason, message = "Unknown", answer.data.decode("utf-8", "replace").strip()
            if answer.status == 404:
                reason = "NotFound"
        raise ApiError(reason, message, details.get("kind", ""))


class Unreachable(ApiError):
    """No answer from the API server."""

    def __init__(self, message: str) -> None:
        super().__init__("ServiceUnavailable", message)


def _context(cluster: Object, user: Object) -> ssl.SSLContext:
    authority = cluster.get("certificate-authority-data")
    if not authority:
        raise Failure("the stand-in reaches a real API server only by a CA in the kubeconfig")
    context = ssl.create_default_context(cadata=base64.b64decode(authority).decode())
    # Python 3.13 demands extensions that the certificates of k3s do not have.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if user.get("client-certificate-data"):
        # Read at once; only ssl itself takes no text.
        with tempfile.NamedTemporaryFile() as file:
            for part in ("client-certificate-data", "client-key-data"):
                file.write(base64.b64decode(user[part]) + b"\n")
            file.flush()
            context.load_cert_chain(file.name)
    return context


def _condition(live: Object, type: str) -> bool:
    conditions = live.get("status", {}).get("conditions") or []
    return any(one["type"] == type and one["status"] == "True" for one in conditions)
