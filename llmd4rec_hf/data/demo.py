# SPDX-License-Identifier: Apache-2.0
"""A generated shop: items whose titles mean something, and users whose interests drift."""

from __future__ import annotations

import datasets
import numpy as np
import pyarrow as pa

from ..errors import ConfigurationError
from .arrow import to_dataset
from .interactions import load_interactions
from .items import load_items


# Department -> category -> kinds of product.
SHOP = {
    "Outdoor": {
        "Hiking": ["hiking boots", "trekking poles", "day pack", "trail map", "hiking socks"],
        "Camping": ["tent", "sleeping bag", "camping stove", "lantern", "sleeping mat"],
        "Cycling": ["cycling helmet", "bike lock", "bicycle pump", "pannier bag", "cycling gloves"],
        "Running": ["running shoes", "running vest", "hydration belt", "running cap", "compression socks"],
    },
    "Kitchen": {
        "Baking": ["cake tin", "rolling pin", "mixing bowl", "pastry brush", "muffin tray"],
        "Coffee": ["espresso cup", "coffee grinder", "moka pot", "milk frother", "pour-over dripper"],
        "Cookware": ["frying pan", "stock pot", "chef's knife", "chopping board", "casserole dish"],
    },
    "Garden": {
        "Planting": ["flower pot", "seed tray", "potting trowel", "raised bed", "watering can"],
        "Lawn": ["lawn rake", "garden hose", "hedge shears", "sprinkler", "edging spade"],
        "Birds": ["bird feeder", "nest box", "bird bath", "suet holder", "seed scoop"],
    },
    "Craft": {
        "Painting": ["watercolour set", "easel", "brush roll", "sketchbook", "palette knife"],
        "Knitting": ["merino yarn", "knitting needles", "stitch markers", "yarn bowl", "row counter"],
        "Sewing": ["fabric scissors", "pin cushion", "sewing kit", "cutting mat", "thread box"],
    },
    "Family": {
        "Toys": ["building blocks", "puzzle", "toy train", "stacking rings", "play tent"],
        "Nursery": ["cot sheet", "night light", "changing bag", "muslin cloths", "baby carrier"],
        "Games": ["board game", "card game", "dice set", "chess set", "memory game"],
    },
}
BRANDS = [
    *["Nordvale", "Fernhill", "Okapi & Co", "Tallow", "Brightwell", "Kestrel", "Amberly", "Quillon", "Moss & Pine"],
    *["Harrowgate", "Lumen", "Sable", "Wrenfield", "Pavo", "Juniper Lane", "Calder", "Ostra", "Bellamy", "Tern"],
    "Vireo",
]
STYLES = [
    *["waterproof", "lightweight", "recycled", "vintage", "compact"],
    *["premium", "handmade", "children's", "classic"],
]
COLOURS = ["black", "brown", "forest green", "navy", "cream", "red", "mustard", "grey"]

# How a user goes on from one purchase to the next: the interest stays, moves to a category nearby, or to any other.
STAY, NEARBY = 0.65, 0.25
# What makes an item attractive, in units of the random taste of the moment.
BRAND_LOYALTY, STYLE_TASTE, COLOUR_TASTE, OTHER_CATEGORY = 1.5, 1.5, 0.7, -12.0
FIRST_SECOND, SECONDS_PER_DAY = 1_600_000_000, 86_400


def make_demo(
    num_users: int = 2000, num_items: int = 1500, seed: int = 0
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """
    Generates a log and its catalogue.

    An item has a category, a brand, a style and a colour, all said in its title ("Nordvale waterproof hiking boots,
    brown"), and a popularity with a long tail. A user walks from category to category, mostly to related ones, keeps
    to a favourite brand and style, and never takes an item twice. With about ten interactions per item and seven per
    user, as in the 5-core sets, ids alone tell only a part of what the titles tell.

    Args:
        num_users (`int`, *optional*, defaults to 2000):
            Users; each has at least five interactions (as far as the catalogue allows).
        num_items (`int`, *optional*, defaults to 1500):
            Items in the catalogue; the least popular ones may never be taken.
        seed (`int`, *optional*, defaults to 0):
            Equal seeds give equal data.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: What [`load_interactions`] and [`load_items`] return; items also
        carry `category`, `brand`, `style` and `colour`.

    Raises:
        `ConfigurationError`: No user, or fewer than 10 items.
    """
    if num_users < 1 or num_items < 10:
        raise ConfigurationError(f"num_users={num_users}, num_items={num_items}; the demo needs 1 user and 10 items")
    rng = np.random.default_rng(seed)
    items = _make_items(num_items, rng)
    user, item, time = _walk(num_users, items, rng)
    log = {
        "user_id": np.char.mod("U%05d", user),
        "item_id": np.char.mod("B%05d", item),
        "timestamp": time,
    }
    return load_interactions(to_dataset(pa.table(log))), load_items(to_dataset(_catalogue(items)))


def _make_items(count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Each item's traits as indices, and the logarithm of its popularity."""
    department = _category_departments()
    size = rng.dirichlet(np.full(len(department), 4.0))
    category = rng.choice(len(size), count, p=size)
    # Five brands per department, and a few of them dominate it.
    brands = np.stack([rng.permutation(len(BRANDS))[:5] for _ in SHOP])
    return {
        "category": category,
        "kind": rng.integers(5, size=count),
        "brand": brands[department[category], rng.choice(5, count, p=[0.35, 0.25, 0.2, 0.12, 0.08])],
        "style": rng.integers(len(STYLES), size=count),
        "colour": rng.integers(len(COLOURS), size=count),
        "log_popularity": rng.normal(0.0, 1.0, count),
    }


def _walk(
    num_users: int, items: dict[str, np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """User index, item index and time of every interaction. All users take a step at once."""
    num_items = len(items["category"])
    length = np.minimum(4 + rng.geometric(0.28, num_users), num_items // 2)
    moves = _category_moves()
    interest = items["category"][rng.integers(num_items, size=num_users)]
    style, colour = rng.integers(len(STYLES), size=num_users), rng.integers(len(COLOURS), size=num_users)
    # The brand a user last took in each department; -1 before the first.
    department = _category_departments()[items["category"]]
    last_brand = np.full((num_users, len(SHOP)), -1)
    time = FIRST_SECOND + rng.integers(540 * SECONDS_PER_DAY, size=num_users)
    seen = np.zeros((num_users, num_items), bool)
    steps = []
    for step in range(length.max()):
        active = np.flatnonzero(length > step)
        if step > 0:
            interest[active] = _sample(moves[interest[active]], rng)
        utility = items["log_popularity"] + rng.gumbel(size=(len(active), num_items))
        utility += OTHER_CATEGORY * (items["category"] != interest[active, None])
        utility += BRAND_LOYALTY * (items["brand"] == last_brand[active][:, department])
        utility += STYLE_TASTE * (items["style"] == style[active, None])
        utility += COLOUR_TASTE * (items["colour"] == colour[active, None])
        utility[seen[active]] = -np.inf
        chosen = utility.argmax(axis=1)
        seen[active, chosen] = True
        last_brand[active, department[chosen]] = items["brand"][chosen]
        time[active] += 1 + rng.exponential(25 * SECONDS_PER_DAY, len(active)).astype(np.int64)
        steps.append((active, chosen, time[active]))
    user, item, moment = (np.concatenate(part) for part in zip(*steps, strict=True))
    return user, item, moment


def _category_departments() -> np.ndarray:
    return np.repeat(np.arange(len(SHOP)), [len(categories) for categories in SHOP.values()])


def _category_moves() -> np.ndarray:
    """Row-stochastic: the chance of each next category given the current one."""
    department = _category_departments()
    same = np.eye(len(department))
    nearby = (department[:, None] == department) - same
    anywhere = np.full_like(same, 1.0 / len(department))
    return STAY * same + NEARBY * nearby / nearby.sum(1, keepdims=True) + (1 - STAY - NEARBY) * anywhere


def _sample(probabilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    below = probabilities.cumsum(1) < rng.random((len(probabilities), 1))
    return np.minimum(below.sum(1), probabilities.shape[1] - 1)


def _catalogue(items: dict[str, np.ndarray]) -> pa.Table:
    categories = [
        (f"{department} > {name}", kinds) for department, shelf in SHOP.items() for name, kinds in shelf.items()
    ]
    brand, style, colour = (
        np.array(names)[items[trait]] for trait, names in (("brand", BRANDS), ("style", STYLES), ("colour", COLOURS))
    )
    kind = np.array([kinds for _, kinds in categories])[items["category"], items["kind"]]
    columns = {
        "item_id": [f"B{number:05d}" for number in range(len(kind))],
        "title": [f"{b} {s} {k}, {c}" for b, s, k, c in zip(brand, style, kind, colour, strict=True)],
        "category": np.array([name for name, _ in categories])[items["category"]],
        "brand": brand,
        "style": style,
        "colour": colour,
    }
    return pa.table({name: pa.array(list(map(str, values)), pa.string()) for name, values in columns.items()})
