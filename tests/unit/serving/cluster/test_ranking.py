"""Order of replicas for a request, and metrics of all replicas, without Ray."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from restune_diffusion.serving.cluster.metrics import merged_metrics
from restune_diffusion.serving.cluster.ranking import REPORT_SECONDS, ReplicaState, SentTuners, ranked

REPLICAS = [
    ReplicaState("ink", frozenset({"ink"}), requests=5),
    ReplicaState("both", frozenset({"ink", "water"}), requests=8),
    ReplicaState("none", requests=1),
]


def test_a_replica_with_the_tuners_may_have_more_requests():
    assert ranked(REPLICAS, {"ink", "water"}, advantage=8) == ["both", "none", "ink"]
    assert ranked(REPLICAS, {"ink", "water"}, advantage=20) == ["both", "ink", "none"]
    assert ranked(REPLICAS, {"ink"}, advantage=8) == ["ink", "both", "none"]
    # One request more than it may have.
    assert ranked(REPLICAS, {"ink"}, advantage=3.5) == ["none", "ink", "both"]
    assert ranked(REPLICAS, set(), advantage=100) == ["none", "ink", "both"]


def test_new_tuners_go_to_the_replica_with_the_fewest():
    idle = [ReplicaState("full", frozenset({"ink", "water"})), ReplicaState("free", frozenset({"ink"}))]
    assert all(ranked(idle, {"fire"}, advantage=8) == ["free", "full"] for _ in range(8))
    equal = [ReplicaState(name) for name in "ab"]
    assert {tuple(ranked(equal, {"fire"}, advantage=8)) for _ in range(64)} == {("a", "b"), ("b", "a")}


def test_a_replica_that_does_not_work_is_the_last():
    stopped = ReplicaState("stopped", frozenset({"ink"}), alive=False)
    assert ranked([stopped, *REPLICAS], {"ink"}, advantage=8) == ["ink", "both", "none", "stopped"]
    assert ranked(REPLICAS, {"ink"}, advantage=8, avoid=["ink"]) == ["both", "none", "ink"]


def test_tuners_of_sent_requests_count_until_the_next_reports():
    sent = SentTuners()
    sent.add("a", {"ink"}, now=100.0)
    sent.add("b", {"water"}, now=101.0)
    assert (sent.on("a", 101.0), sent.on("b", 101.0), sent.on("c", 101.0)) == ({"ink"}, {"water"}, set())
    assert sent.on("a", 100.0 + REPORT_SECONDS) == set()
    sent.add("a", {"fire"}, now=101.0 + REPORT_SECONDS)
    assert sent.on("a", 101.0 + REPORT_SECONDS) == {"fire"}


def test_metrics_of_replicas_have_one_family_and_a_label():
    first = "# HELP images_total Done.\n# TYPE images_total counter\nimages_total 3.0\n"
    second = first.replace("3.0", "4.0") + '# HELP depth Now.\n# TYPE depth gauge\ndepth{part="a"} 2.0\n'
    text = merged_metrics({"r1": first, "r2": second}).decode()
    assert text.count("# TYPE images_total counter") == text.count("# HELP images_total Done.") == 1
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    assert [(sample.name, sample.labels, sample.value) for sample in samples] == [
        ("images_total", {"replica": "r1"}, 3.0),
        ("images_total", {"replica": "r2"}, 4.0),
        ("depth", {"replica": "r2", "part": "a"}, 2.0),
    ]
