"""What is to be said of the nodes' scratch. Nothing here is an error: a run does without."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from cryoiso.io.staging import MEMORY, NETWORK
from cryoiso.pipeline.finding import FINE, NOTE, WARNING, Finding, gib
from cryoiso.pipeline.site.folder_checks import SLOW_MBPS, free_words, speed_words

SCRATCH = "scratch"


def scratch_findings(nodes: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """Findings of the facts that ``scratch_probe.look_for_scratch`` gives, by host."""
    for host, node in nodes.items():
        if not node["why_not"]:
            needed = f"; the images take about {gib(node['needed_bytes'])}" if node["needed_bytes"] else ""
            where = f"{node['path']} ({node['type'] or 'unknown type'}) on {host}"
            yield Finding(SCRATCH, FINE, f"{where}: {free_words(node)}{speed_words(node)}{needed}")
    yield from _together(nodes, "why_not", "not used", "The run reads its images from the shared files there.")
    yield from _together(
        nodes, "why_partly", "only for the particles themselves",
        "The auxiliary particles that do not fit are read from the shared files there.",
    )  # fmt: skip
    yield from _kinds({host: node for host, node in nodes.items() if not node["why_not"]})


def _together(nodes: dict[str, dict[str, Any]], key: str, what: str, remedy: str) -> Iterator[Finding]:
    """One warning for all hosts that give the same reason."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for host, node in nodes.items():
        if node[key]:
            reasons[node[key]].append(host)
    for why, hosts in reasons.items():
        yield Finding(SCRATCH, WARNING, f"{what} on {', '.join(hosts)}: {why}", f"{remedy} See docs/scratch.md")


def _kinds(nodes: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """What is used, but may be no gain."""
    slow = {host: node for host, node in nodes.items() if node["write_MBps"] and node["write_MBps"] < SLOW_MBPS}
    if slow:
        host, node = min(slow.items(), key=lambda item: item[1]["write_MBps"])
        yield Finding(
            SCRATCH,
            WARNING,
            f"{node['path']} on {host} takes only {node['write_MBps']:.0f} MB/s",
            "The run waits until its images are copied: choose a faster disk, or leave run.scratch empty.",
        )
    in_memory = [host for host, node in nodes.items() if node["type"] in MEMORY]
    if in_memory:
        yield Finding(
            SCRATCH,
            NOTE,
            f"the copies on {', '.join(in_memory)} lie in memory",
            "They count as memory of the job: ask the batch system for as much more.",
        )
    remote = [host for host, node in nodes.items() if (node["type"] or "").startswith(NETWORK)]
    if remote:
        yield Finding(
            SCRATCH,
            NOTE,
            f"scratch on {', '.join(remote)} is on a network file system",
            "It is used as named, but gains nothing over the shared files: name a disk of the node.",
        )
    idle = [host for host, node in nodes.items() if not node["needed_bytes"]]
    if idle:
        yield Finding(
            SCRATCH, NOTE, "no stage of this job makes copies: RELION reads images of its own",
            "relion.extra = '--scratch_dir FOLDER' is RELION's own. See docs/scratch.md",
        )  # fmt: skip
