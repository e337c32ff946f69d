from concurrent.futures import Future

from server_calls import Clock, config

from eagle_rpc.service.fairness import Demand, FairQueue, Work


def work(name):
    """`job session number`, each a letter or digit."""
    return Work(name, name[0], name[1], name[2], 0.0, lambda reply: None, Future())


def filled(*names):
    queue = FairQueue(
        config(), Demand(Clock()), most="max_queued_requests", most_of_session="max_queued_per_session"
    )
    for name in names:
        queue.put(work(name), running=[])
    return queue


def order(queue):
    return [item.run + item.session + item.request_id for item in (queue.take() for _ in range(len(queue)))]


def test_a_session_is_served_in_the_order_of_its_requests():
    assert order(filled("Aa3", "Aa1", "Aa2")) == ["Aa3", "Aa1", "Aa2"]


def test_sessions_of_a_run_take_turns():
    assert order(filled("Aa1", "Aa2", "Aa3", "Ab1")) == ["Aa1", "Ab1", "Aa2", "Aa3"]


def test_runs_take_turns_however_many_sessions_they_have():
    assert order(filled("Aa1", "Ab1", "Ac1", "Ad1", "Bx1", "Bx2")) == [
        "Aa1",
        "Bx1",
        "Ab1",
        "Bx2",
        "Ac1",
        "Ad1",
    ]


def test_a_flood_does_not_keep_a_newcomer_waiting_for_more_than_one_request():
    queue = filled(*(f"A{session}{number}" for session in "abcdef" for number in range(10)))
    queue.take()
    queue.put(work("Bx1"), running=[])
    assert "Bx1" in order(queue)[:2]


def test_an_empty_queue_gives_nothing():
    assert filled().take() is None


def test_what_is_put_under_the_same_id_takes_its_place():
    queue = filled("Aa1", "Aa2")
    again = work("Aa1")
    assert queue.put(again, running=[]).request == "Aa1"
    assert (len(queue), queue.take()) == (2, again)


def test_removal_leaves_the_rest_in_order_and_counts_follow():
    queue = filled("Aa1", "Aa2", "Ab1", "Bx1")
    assert [queue.num_of_session(*names) for names in ("Aa", "Ab", "Bx", "Cc")] == [2, 1, 1, 0]
    removed = queue.remove(lambda item: item.session == "a")
    assert sorted(item.request_id for item in removed) == ["1", "2"]
    assert [queue.num_of_session(*names) for names in ("Aa", "Ab", "Bx")] == [0, 1, 1]
    assert order(queue) == ["Ab1", "Bx1"]
    assert not queue
