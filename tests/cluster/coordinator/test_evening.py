"""The whole of it, with real processes: answers that go on whatever ends in the middle of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from homeinfer.cluster import pairing
from homeinfer.cluster.agent_options import AgentOptions, AgentStart
from homeinfer.cluster.client import ClusterClient, ClusterTeller
from homeinfer.cluster.wire.codes import decode_code
from homeinfer.cluster.wire.keys import own_keys
from homeinfer.engine.request import Request, Sampling
from homeinfer.errors import HomeinferError
from tests.cluster.coordinator.homes import GREEDY, Home, TestCluster, desk_and_box, processes
from tests.support.reference import Reference, agreement, references

LIMIT, BEFORE = 60, 12


@pytest.fixture(scope="module")
def expected(smollm2_path: Path) -> Reference:
    # if what was told were read again as a prompt after a failure, other tokens would follow: logits move by 0.3 then
    text = "A list of colours: red, green,"
    return references(smollm2_path, [text], LIMIT, longest=64, n_ctx=256)[0]


@pytest.fixture(scope="module")
def pair(smollm2_path: Path) -> Iterator[TestCluster]:
    """A head, and a faster box that gets most layers. Each test leaves both of them ready."""
    with desk_and_box(smollm2_path, box_rate=20e9, sequences=2) as made:
        yield made


def interrupted(made: TestCluster, expected: Reference, strike: Callable[[], None]) -> list[str]:
    """An answer in the middle of which something happens; the lines that its user saw."""
    struck = threading.Event()
    count = 0

    def on_token(_token: int) -> None:
        nonlocal count
        count += 1
        if count == BEFORE:
            strike()
            struck.set()

    tokens, notices = made.tell(expected.prompt, LIMIT, on_token)
    assert struck.is_set()
    assert agreement([expected], [tokens]).ties == 0
    return notices


def test_two_devices_answer_as_llama_cpp_does(pair: TestCluster, expected: Reference) -> None:
    tokens, notices = pair.tell(expected.prompt, LIMIT)
    assert agreement([expected], [tokens]).ties == 0
    assert notices == []


def test_an_engine_that_is_killed_costs_no_token(pair: TestCluster, expected: Reference) -> None:
    assert pair.head.process is not None
    for home in (pair.devices["box"], pair.head):
        assert home.process is not None
        (engine,) = processes(home.process.pid, "homeinfer.cluster.engine")
        notices = interrupted(pair, expected, engine.kill)
        assert any("ended: killed by SIGKILL" in line for line in notices)
        assert any("goes on with 2 devices" in line for line in notices)


def test_an_agent_that_is_killed_leaves_its_layers_to_the_others(pair: TestCluster, expected: Reference) -> None:
    notices = interrupted(pair, expected, pair.devices["box"].kill)
    assert any(line.startswith("box left, re-planned on 1 device,") for line in notices)
    pair.join("box")
    status = pair.ready(2)
    assert any(line.startswith("box joined, re-planned on 2 devices") for line in status.events)


def test_the_heads_own_agent_that_is_killed_comes_back(pair: TestCluster, expected: Reference) -> None:
    assert pair.head.process is not None
    (agent,) = processes(pair.head.process.pid, "homeinfer.cluster.agent")
    notices = interrupted(pair, expected, agent.kill)
    assert any("goes on with 2 devices" in line for line in notices)


def test_an_answer_goes_on_after_the_coordinator_was_killed(pair: TestCluster, expected: Reference) -> None:
    def strike() -> None:
        pair.head.kill()
        pair.up()

    interrupted(pair, expected, strike)
    assert pair.ready(2).answered == 1


def test_two_at_a_time_are_written_and_more_wait(pair: TestCluster, expected: Reference) -> None:
    answers: list[list[int]] = []
    notices: list[str] = []

    def tell() -> None:
        tokens, said = pair.tell(expected.prompt, LIMIT)
        answers.append(tokens)
        notices.extend(said)

    threads = [threading.Thread(target=tell) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert agreement([expected] * 3, answers).ties == 0
    assert notices == ["others are being answered, 2 at a time: this waits its turn"]


def test_prompts_that_cannot_be_answered_are_refused_in_one_line(pair: TestCluster) -> None:
    for prompt, reason in (
        ([], "the prompt is empty"),
        ([5] * 256, "the prompt has 256 tokens, the cluster's context 256"),
        ([5, 49152], "has a token 49152, and the cluster's model only 49,152"),
    ):
        with pytest.raises(HomeinferError, match=reason):
            pair.tell(prompt, 5)


def test_an_answer_can_be_stopped_in_the_middle(pair: TestCluster, expected: Reference) -> None:
    status = pair.status()
    assert status is not None
    tokens: list[int] = []
    with closing(ClusterTeller(pair.head.state, status)) as teller:
        finish = teller.tell(expected.prompt, Request(GREEDY, LIMIT), tokens.append, lambda: len(tokens) > 5)
    assert finish.reason == "cancelled"
    assert 5 < len(tokens) < LIMIT


def test_a_grammar_that_cannot_be_read_fails_its_answer_alone(pair: TestCluster, expected: Reference) -> None:
    status = pair.status()
    assert status is not None
    request = Request(Sampling(temperature=0, grammar="root ::= ("), 5)
    with closing(ClusterTeller(pair.head.state, status)) as teller, pytest.raises(HomeinferError, match="grammar"):
        teller.tell(expected.prompt, request, lambda _token: None, lambda: False)
    after = pair.status()
    assert after is not None
    assert after.epoch == status.epoch


def test_a_second_cluster_on_one_machine_is_refused(pair: TestCluster) -> None:
    second = Home(pair.head.folder)
    second.start("homeinfer.cluster.coordinator", pair.options)
    assert second.process is not None
    assert second.process.wait(60) == 1
    assert "a cluster runs on this machine already" in second.log()


def test_a_device_is_paired_by_code_and_forgotten_by_name(pair: TestCluster) -> None:
    with closing(ClusterClient(pair.head.state)) as client:
        client.order("code")
        code = pair.wait(lambda status: status.code is not None).code
        assert code is not None
        pad = Home(pair.head.folder.parent / "pad")
        head = asyncio.run(pairing.pair(decode_code(code), own_keys(pad.state), "desk"))
        assert (head.name, head.port) == ("desk", pair.options.port)
        pair.devices["pad"] = pad
        pad.start("homeinfer.cluster.agent", AgentStart(AgentOptions(head.hosts, head.port, head.key)))
        pair.wait(lambda status: "desk-2" in [device.name for device in status.devices])
        with pytest.raises(HomeinferError, match="it can't be forgotten"):
            client.order("forget", "desk")
        client.order("forget", "desk-2")
        assert pad.process is not None
        assert pad.process.wait(60) == 0
        assert "this device was forgotten" in pad.log()
        assert [device.name for device in client.status().devices] == ["desk", "box"]


def test_taken_down_in_the_middle_of_an_answer_it_says_so_and_leaves_nothing(
    pair: TestCluster, expected: Reference
) -> None:
    tokens: list[int] = []

    def on_token(token: int) -> None:
        tokens.append(token)
        if len(tokens) == 5:
            with closing(ClusterClient(pair.head.state)) as client:
                client.order("down")

    with pytest.raises(HomeinferError, match="the cluster was taken down"):
        pair.tell(expected.prompt, LIMIT, on_token)
    assert pair.head.process is not None
    assert pair.head.process.wait(60) == 0
    assert sorted(path.name for path in (pair.head.state / "run").iterdir()) == ["lock"]
    assert not list((pair.head.state / "cluster" / "answers").iterdir())
    assert pair.devices["box"].process is not None
    assert pair.devices["box"].process.poll() is None  # it waits for the head to come up again
