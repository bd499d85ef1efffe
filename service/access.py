"""Who calls, and what they may: identities from API tokens and client certificates, scopes, how much of an answer is told.

As long as the configuration names no caller, everybody is `anonymous` and may do all that the public port offers. Once it
names one, nothing but health is answered without credentials.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import grpc

from service.config import CallerConfig, Disclosure, QuotaConfig, Scope, ScopeConfig, ServiceConfig
from service.errors import Forbidden, Unauthenticated

AUTHORIZATION = "authorization"
BEARER = "bearer "
ANONYMOUS = "anonymous"
# of auth_context(): names that a verified certificate carries
IDENTITIES = ("x509_subject_alternative_name", "x509_common_name")


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody known, or anybody where nobody has to be."""

    name: str
    scopes: frozenset[Scope]
    disclosure: Disclosure  # at most
    ensembles: frozenset[str] | None  # those it may ask; None: all
    quota: QuotaConfig

    @property
    def turn(self) -> str:
        """Whose turn in a queue its requests take; empty where callers cannot be told apart."""
        return "" if self.name == ANONYMOUS else self.name

    def check(self, scope: Scope, purpose: str) -> None:
        """Raise Forbidden where the caller lacks the scope for `purpose`."""
        if scope not in self.scopes:
            raise Forbidden(f"{purpose} needs the scope `{scope}`, which caller `{self.name}` does not have")

    def check_ensemble(self, name: str) -> None:
        """Raise Forbidden where the caller may not ask this ensemble; whether there is one of this name is not told."""
        if self.ensembles is not None and name not in self.ensembles:
            allowed = ", ".join(sorted(self.ensembles)) or "none"
            raise Forbidden(f"caller `{self.name}` may ask {allowed}; others need the scope `{Scope.ABLATE}`")


class Access:
    """The callers of a configuration. Immutable: a reload makes another one, and what it revoked is revoked at once."""

    def __init__(self, config: ServiceConfig) -> None:
        limit = config.limits.disclosure
        self._anonymous = Caller(ANONYMOUS, frozenset(Scope), limit, None, config.quota)
        self._tokens: list[tuple[bytes, Caller]] = []
        self._certificates: dict[str, Caller] = {}
        for name, its in config.callers.items():
            told = min(limit, _disclosed(config, its), its.disclosure or Disclosure.EVIDENCE)
            caller = Caller(name, frozenset(its.scopes), told, _callable(config, its), its.quota or config.quota)
            if its.token_sha256 is not None:
                self._tokens.append((bytes.fromhex(its.token_sha256), caller))
            if its.certificate is not None:
                self._certificates[its.certificate] = caller
        self.open = not config.callers

    def identify(self, context: grpc.ServicerContext) -> Caller:
        """Who this call is from; raises Unauthenticated."""
        if self.open:
            return self._anonymous
        token = _token(context.invocation_metadata())
        if token is not None:
            return self._holder(token)
        if self._certificates:
            shown = cast(Mapping[str, Iterable[bytes]], context.auth_context())  # its published type is another
            for identity in _certified(shown):
                if (caller := self._certificates.get(identity)) is not None:
                    return caller
        raise Unauthenticated("expected credentials: metadata `authorization: Bearer TOKEN`" + self._or_certificate)

    def _holder(self, token: str) -> Caller:
        presented, found = hashlib.sha256(token.encode()).digest(), None
        for digest, caller in self._tokens:  # all of them, each in constant time: when it takes as long as when it fails
            if hmac.compare_digest(digest, presented):
                found = caller
        if found is None:
            raise Unauthenticated("this token is not, or no longer, one that is known here")
        return found

    @property
    def _or_certificate(self) -> str:
        return ", or a client certificate of a caller that is known here" if self._certificates else ""


def token_digest(token: str) -> str:
    """What a configuration keeps of a token. Tokens are long and random, so that a plain hash is not to be searched."""
    return hashlib.sha256(token.encode()).hexdigest()


def _disclosed(config: ServiceConfig, caller: CallerConfig) -> Disclosure:
    """The most that one of the caller's scopes allows."""
    return max((its.disclosure for its in _granted(config, caller).values()), default=Disclosure.LABEL)


def _callable(config: ServiceConfig, caller: CallerConfig) -> frozenset[str] | None:
    """The ensembles of all of its scopes together."""
    found = set[str]()
    for scope, its in _granted(config, caller).items():
        if its.ensembles is None and scope is Scope.ABLATE:
            return None
        found |= {next(iter(config.ensembles))} if its.ensembles is None else set(its.ensembles)
    return frozenset(found)


def _granted(config: ServiceConfig, caller: CallerConfig) -> dict[Scope, ScopeConfig]:
    """Those of its scopes that ask for answers."""
    asking = {Scope.CLASSIFY: config.scopes.classify, Scope.ABLATE: config.scopes.ablate}
    return {scope: its for scope, its in asking.items() if scope in caller.scopes}


def _token(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    for key, value in metadata:
        if key == AUTHORIZATION and isinstance(value, str):
            if value[: len(BEARER)].lower() != BEARER:
                raise Unauthenticated("expected metadata `authorization: Bearer TOKEN`, got another kind of authorization")
            return value[len(BEARER) :].strip()
    return None


def _certified(context: Mapping[str, Iterable[bytes]]) -> Iterable[str]:
    """The names that the caller's verified certificate carries."""
    for key in IDENTITIES:
        for name in context.get(key, ()):
            yield name.decode(errors="replace")
