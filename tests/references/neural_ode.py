"""Tsit5 in Python floats, number by number, and its two heuristics: a twin of optex/regularisers/ode."""

import math

C = (0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0)
A = (
    (),
    (0.161,),
    (-0.008480655492356989, 0.335480655492357),
    (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
    (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
    (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.02826905039406838),
    (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774),
)
B_ERROR = (
    0.00178001105222577714,
    0.0008164344596567469,
    -0.007880878010261995,
    0.1447110071732629,
    -0.5823571654525552,
    0.45808210592918697,
    -1 / 66,
)


def rms(values):
    return math.sqrt(sum(value * value for value in values) / len(values))


def tsit5(field, time, state, size):
    """A step: u⁺, its error, the seven stages, and g_6, g_7."""
    stages, points = [], []
    for node, weights in zip(C, A, strict=True):
        point = [
            u + size * sum(weight * stage[i] for weight, stage in zip(weights, stages, strict=True))
            for i, u in enumerate(state)
        ]
        points.append(point)
        stages.append(field(time + node * size, point))
    error = [
        size * sum(weight * stage[i] for weight, stage in zip(B_ERROR, stages, strict=True))
        for i in range(len(state))
    ]
    return points[6], error, stages, points[5], points[6]


def heuristics(field, time, state, size, rtol, atol):
    """E and S of a step."""
    after, error, stages, sixth, seventh = tsit5(field, time, state, size)
    scaled = [e / (atol + rtol * max(abs(u), abs(v))) for e, u, v in zip(error, state, after, strict=True)]
    slopes = rms([a - b for a, b in zip(stages[6], stages[5], strict=True)])
    apart = rms([a - b for a, b in zip(seventh, sixth, strict=True)])
    return rms(scaled), (slopes / apart if apart > 0 else 0.0) / 3.5068


def adaptive(field, state, end, size, rtol, atol):
    """The accepted steps (start, size, state) from time 0, with an integral controller of order 5."""
    time, taken = 0.0, []
    while time < end:
        size = min(size, end - time)
        after = tsit5(field, time, state, size)[0]
        error = heuristics(field, time, state, size, rtol, atol)[0]
        if error < 1:
            taken.append((time, size, state))
            time, state = (end if size == end - time else time + size), after
        size *= min(max(0.9 * error ** (-1 / 5), 0.2), 10.0)
    return taken, state
