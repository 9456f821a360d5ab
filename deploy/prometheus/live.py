"""Check of rules and dashboards against a live server, by a Prometheus started for it.

    python -m deploy.prometheus.live --target http://127.0.0.1:8000 --key-file metrics.key

Run requests of every kind meanwhile. Ends with 1 and lists the expressions that name a series that
does not exist, and the panels and recording rules that stay empty. --page prints a table of numbers
per tenant; --keep leaves Prometheus running until Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from deploy.check.tools import ToolsMissingError
from deploy.prometheus import expressions
from deploy.prometheus.expressions import Expression
from deploy.prometheus.page import page
from deploy.prometheus.stack import Stack, StackError, running


def unknown(stack: Stack, every: Iterable[Expression]) -> list[str]:
    """Expressions that read series which are neither scraped nor recorded."""
    known = stack.names() | expressions.OF_PROMETHEUS
    errors = []
    for expression in every:
        missing = sorted(expressions.metrics(expression) - known)
        if missing:
            errors.append(f"{expression}: no series {', '.join(missing)}")
    return errors


def empty(
    stack: Stack, every: Iterable[Expression], *, tenant: str, unseen: Sequence[str] = ()
) -> list[str]:
    """Panels, records and selectors without data; of alerts, which are usually silent, selectors.

    `unseen`: parts of expressions that cannot have data here, such as `outcome="server_error"`.
    """
    errors = []
    known: dict[str, bool] = {}
    for expression in every:
        texts = expressions.selectors(expression, tenant=tenant)
        if expression.kind == "record":
            texts.append(expression.name)
        elif expression.kind != "alert":
            texts.append(expressions.filled(expression.text, tenant=tenant))
        for text in dict.fromkeys(texts):
            if text.startswith("ALERTS") or any(part in text for part in unseen):
                continue
            if text not in known:
                known[text] = bool(stack.query(text))
            if not known[text]:
                errors.append(f"{expression}: no data from {text}")
    return errors


def check(
    stack: Stack, *, tenant: str, unseen: Sequence[str] = (), patience_s: float = 60.0
) -> list[str]:
    """All errors of rules and dashboards against what the stack has scraped.

    Retries for `patience_s`: one scrape may fail, and rules build on rules.
    """
    end = time.monotonic() + patience_s
    every = [*expressions.rules(), *expressions.dashboards()]
    while True:
        rules = [rule for group in stack.get("rules")["groups"] for rule in group["rules"]]
        found = [
            f"{rule['name']}: {rule['lastError']}" for rule in rules if rule["health"] == "err"
        ]
        found += unknown(stack, every)
        found = found or empty(stack, every, tenant=tenant, unseen=unseen)
        if not found or time.monotonic() > end:
            return found
        time.sleep(1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.prometheus.live", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--target", action="append", required=True, help="a server's URL")
    parser.add_argument("--key-file", type=Path, help="holds a key that may read /metrics")
    parser.add_argument("--seconds", type=float, default=60, help="how long to scrape (60)")
    parser.add_argument("--tenant", default=".+", help="tenant of the tenant dashboard, a regex")
    parser.add_argument("--unseen", action="append", default=[], help="part of selectors to skip")
    parser.add_argument("--patient", action="store_true", help="alerts wait as in production")
    parser.add_argument("--page", action="store_true", help="print numbers per tenant")
    parser.add_argument("--keep", action="store_true", help="run until Ctrl-C")
    given = parser.parse_args(arguments)
    try:
        key = given.key_file.read_text().strip() if given.key_file else None
        with (
            tempfile.TemporaryDirectory() as folder,
            running(given.target, Path(folder), key=key, fast=not given.patient) as stack,
        ):
            print(f"Prometheus: {stack.url}")
            stack.until("a scrape", lambda: stack.query("safegene_build_info"))
            time.sleep(given.seconds)
            found = check(stack, tenant=_one(stack, given.tenant), unseen=given.unseen)
            if given.page:
                print(page(stack))
            print("\n".join(found) or "every expression is known and returns data")
            if given.keep:
                print("Ctrl-C ends it", flush=True)
                while True:
                    time.sleep(3600)
            return 1 if found else 0
    except KeyboardInterrupt:
        return 0
    except (OSError, StackError, ToolsMissingError) as error:
        print(error, file=sys.stderr)
        return 1


def _one(stack: Stack, wanted: str) -> str:
    """A served tenant, as the dashboard shows one. Raises: StackError."""
    found = stack.query(f'safegene_revision_info{{tenant=~"{wanted}",tenant!=""}}')
    if not found:
        raise StackError(f"no served tenant matches {wanted!r}; publish one first.")
    return found[0].labels["tenant"]


if __name__ == "__main__":
    sys.exit(main())
