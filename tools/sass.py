"""The loops of a kernel in SASS, as ``nvdisasm -c`` prints it, and how many instructions a turn of them takes."""

import re
from dataclasses import dataclass, field

# An instruction of a main loop that has to be on its path, and one that ends a block.
_MOVES = re.compile(r"(HMMA|LDGSTS|STG)\b|LDG\.E\S*\.128")
_LINE = re.compile(r"^(\.\w+):|/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)([^;\n]*)", re.M)
_JUMPS, _ENDS = ("BRA", "BRX", "BRXU"), ("EXIT", "RET")


@dataclass
class Block:
    """Instructions that run one after the other."""

    count: int = 0
    moves: int = 0
    copies: bool = False
    multiplies: bool = False
    next: list[int] = field(default_factory=list)  # places of the first instructions of the blocks behind


def blocks_of(sass: str) -> dict[int, Block]:
    """Return the blocks of a kernel by the number of their first instruction."""
    code, labels = [], {}
    for label, guard, opcode, rest in (match.groups() for match in _LINE.finditer(sass)):
        if label:
            labels[label] = len(code)
        else:
            code.append((bool(guard), opcode, rest))
    targets = {
        place: [labels[label] for label in re.findall(r"\.L\w+", rest) if label in labels]
        for place, (_, opcode, rest) in enumerate(code) if opcode in _JUMPS
    }  # fmt: skip
    ends = {place + 1 for place, (_, opcode, _) in enumerate(code) if opcode in (*_JUMPS, *_ENDS)}
    heads = ({0} | ends | {target for found in targets.values() for target in found}) - {len(code)}
    blocks: dict[int, Block] = {}
    for place, (guarded, opcode, rest) in enumerate(code):
        if place in heads:
            block = blocks[place] = Block()
        block.count += 1
        block.moves += bool(_MOVES.match(opcode + rest))
        block.copies |= opcode == "LDGSTS"
        block.multiplies |= opcode == "HMMA"
        block.next += targets.get(place, [])
        # A condition is a guard or, of BRA, an operand in front of the target.
        goes_on = guarded or opcode not in (*_JUMPS, *_ENDS) or (opcode == "BRA" and "," in rest)
        if goes_on and place + 1 in heads:
            block.next.append(place + 1)
    return blocks


def loops_of(blocks: dict[int, Block]) -> list[tuple[int, set[int], set[tuple[int, int]]]]:
    """Return head and blocks of each loop, and the edges that lead back in the kernel."""
    back, state = set(), {}

    def visit(entry: int) -> None:
        stack = [(entry, iter(blocks[entry].next))]
        state[entry] = "open"
        while stack:
            place, rest = stack[-1]
            for behind in rest:
                if state.get(behind) == "open":
                    back.add((place, behind))
                elif behind not in state:
                    state[behind] = "open"
                    stack.append((behind, iter(blocks[behind].next)))
                    break
            else:
                state[place] = "done"
                stack.pop()

    visit(min(blocks))
    before: dict[int, list[int]] = {}
    for place, block in blocks.items():
        for behind in block.next:
            before.setdefault(behind, []).append(place)
    bodies: dict[int, set[int]] = {}
    for last, head in back:
        body, left = bodies.setdefault(head, {head}), [last]
        while left:
            place = left.pop()
            if place not in body:
                body.add(place)
                left += before.get(place, [])
    return [(head, body, back) for head, body in bodies.items()]


def main_loops(sass: str) -> list[int]:
    """Return, in the order of the code, the instructions of a turn of each innermost loop that copies tiles and
    multiplies them."""
    blocks = blocks_of(sass)
    loops = [
        (head, body, back) for head, body, back in loops_of(blocks)
        if any(blocks[place].copies for place in body) and any(blocks[place].multiplies for place in body)
    ]  # fmt: skip
    inner = [loop for loop in loops if not any(other[1] < loop[1] for other in loops)]
    return [_shortest_turn(blocks, *loop) for loop in sorted(inner, key=lambda loop: loop[0])]


def _shortest_turn(blocks: dict[int, Block], head: int, body: set[int], back: set[tuple[int, int]]) -> int:
    """Return the instructions of the shortest of the turns that move and multiply most, inner loops passed once."""
    best: dict[int, tuple[int, int]] = {}

    def turn(place: int) -> tuple[int, int]:
        if place not in best:
            block = blocks[place]
            ends = [(0, 0)] * ((place, head) in back)
            ends += [turn(b) for b in block.next if b in body and (place, b) not in back]
            moves, count = max(ends, default=(-(1 << 30), 0))
            best[place] = moves + block.moves, count - block.count
        return best[place]

    return -turn(head)[1]
