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

from service.config import CallerConfig, Disclosure, QuotaConfig, Scope, ServiceConfig
from service.context import Context
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
    told: Mapping[str, Disclosure]  # ensemble -> how much of its answers, at most
    told_of_others: Disclosure | None  # of every other ensemble; None: it may not ask them
    quota: QuotaConfig

    @property
    def turn(self) -> str:
        """Whose turn in a queue its requests take; empty where callers cannot be told apart."""
        return "" if self.name == ANONYMOUS else self.name

    def check(self, scope: Scope, purpose: str) -> None:
        """Raise Forbidden where the caller lacks the scope for `purpose`."""
        if scope not in self.scopes:
            raise Forbidden(f"{purpose} needs the scope `{scope}`, which caller `{self.name}` does not have")

    def may_ask(self, ensemble: str) -> bool:
        return ensemble in self.told or self.told_of_others is not None

    def check_ensemble(self, name: str) -> None:
        """Raise Forbidden where the caller may not ask this ensemble; whether there is one of this name is not told."""
        if not self.may_ask(name):
            allowed = ", ".join(sorted(self.told)) or "none"
            raise Forbidden(f"caller `{self.name}` may ask {allowed}; others need the scope `{Scope.ABLATE}`")

    def disclosure(self, ensemble: str) -> Disclosure:
        """How much of this ensemble's answers the caller is told, at most; the least where it may not ask it at all."""
        return self.told.get(ensemble, self.told_of_others or Disclosure.LABEL)


class Access:
    """The callers of a configuration. Immutable: a reload makes another one, and what it revoked is revoked at once."""

    def __init__(self, config: ServiceConfig) -> None:
        limit = config.limits.disclosure
        self._anonymous = Caller(ANONYMOUS, frozenset(Scope), {}, limit, config.quota)
        self._tokens: list[tuple[str, Caller]] = []  # hashes
        self._certificates: dict[str, Caller] = {}
        for name, its in config.callers.items():
            told, others = _told(config, its, min(limit, its.disclosure or Disclosure.EVIDENCE))
            caller = Caller(name, frozenset(its.scopes), told, others, its.quota or config.quota)
            if its.token_sha256 is not None:
                self._tokens.append((its.token_sha256, caller))
            if its.certificate is not None:
                self._certificates[its.certificate] = caller
        self.open = not config.callers

    def identify(self, context: Context) -> Caller:
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
        presented, found = token_digest(token), None
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


def _told(config: ServiceConfig, caller: CallerConfig, most: Disclosure) -> tuple[dict[str, Disclosure], Disclosure | None]:
    """How much of which ensemble's answers, and of all others: of each the most that one of its scopes gives."""
    told: dict[str, Disclosure] = {}
    others: Disclosure | None = None
    for scope, its in ((Scope.CLASSIFY, config.scopes.classify), (Scope.ABLATE, config.scopes.ablate)):
        if scope not in caller.scopes:
            continue
        level = min(most, its.disclosure)
        if its.ensembles is None and scope is Scope.ABLATE:
            others = level
        for name in its.ensembles or (next(iter(config.ensembles)),):
            told[name] = max(level, told.get(name, level))
    return told, others


def _token(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    for key, value in metadata:
        if key == AUTHORIZATION and isinstance(value, str):
            if value[: len(BEARER)].lower() != BEARER:
                raise Unauthenticated("expected metadata `authorization: Bearer TOKEN`, got another kind of authorization")
            return value[len(BEARER) :].strip()
    return None


def _certified(context: Mapping[str, Iterable[bytes]]) -> Iterable[str]:
    """The names that the caller's verified certificate carries; the common name is only looked at where there is no other."""
    names = next((found for key in IDENTITIES if (found := list(context.get(key, ())))), [])
    return [name.decode(errors="replace") for name in names]
