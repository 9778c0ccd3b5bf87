"""Icon sets of the bundled base and the benchmarks: packages, checksums, captions and concepts."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A pinned npm package and the phrase for its style in a prompt."""

    package: str
    version: str
    sha512: str
    licence: str
    style: str = ""

    @property
    def tarball(self) -> str:
        """File name of the package after `npm pack`."""
        return f"{self.package.lstrip('@').replace('/', '-')}-{self.version}.tgz"


SOURCES = {
    "noto": Source(
        "@iconify-json/noto",
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
        "noto style",
    ),
    "twemoji": Source(
        "@iconify-json/twemoji",
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0",
        "twemoji style",
    ),
    "fluent-emoji-flat": Source(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
        "fluent flat style",
    ),
    "emojione": Source(
        "@iconify-json/emojione",
        "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "CC-BY-4.0",
        "emojione style",
    ),
    "noto-v1": Source(
        "@iconify-json/noto-v1",
        "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Apache-2.0",
        "blob style",
    ),
    "fluent-emoji": Source(
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        "MIT",
        "glossy style",
    ),
    "openmoji": Source(
        "@iconify-json/openmoji",
        "1.2.29",
        "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
        "CC-BY-SA-4.0",
        "outlined style",
    ),
    "fluent-emoji-high-contrast": Source(
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
        "MIT",
        "ink style",
    ),
}
PRETRAINING_SETS = ("noto", "twemoji", "fluent-emoji-flat", "emojione", "noto-v1")
# Not used for pretraining: styles of the icon-style benchmark.
DEVELOPMENT_SETS = ("fluent-emoji", "openmoji")
NAMES = Source(
    "emojibase-data",
    "17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    "MIT",
)

DEMO_SET = "fluent-emoji-high-contrast"
DEMO_CONCEPTS = (
    "strawberry", "avocado", "hamburger", "doughnut", "mushroom", "fox", "panda", "frog", "octopus", "butterfly",
    "penguin", "whale", "cactus", "sunflower", "cloud", "star", "rocket", "balloon", "guitar", "umbrella",
    "gem-stone", "light-bulb", "smiling-face-with-sunglasses", "crown",
)  # fmt: skip

SKIN_TONE = re.compile(r"-(light|medium-light|medium|medium-dark|dark)(-skin-tone)?(-|$)")
LEFT_OUT = re.compile(
    r"^(flag-|letter-|keycap|digit-|regional-indicator|squared-|circled-|input-|\d+$|.$)"
    r"|-(skin-tone|button|button-blood-type|hair)$|^(beard|bald|curly-hair|red-hair|white-hair)$"
)
GENDERED = re.compile(r"^(man|woman|men|women|person) .+|^(kiss|couple|family|people)\b|holding hands")
CLOCK = re.compile(r"(o['’]?clock|[- ]thirty)$")
ZODIAC = re.compile(r"^(aries|taurus|gemini|cancer|leo|virgo|libra|scorpio|sagittarius|capricorn|aquarius|pisces)$")
# Minimum number of pretraining sets for a concept of full weight; rarer concepts teach little.
WIDELY_DRAWN = 4
# Frequently requested concepts: sampled several times as often as the rest, so that short training learns them well.
COMMON_NAMES = """
    airplane, alarm clock, alien, ambulance, american football, anchor, angry face, ant, artist palette,
    astonished face, automobile, avocado, axe, baby, baby chick, backpack, balloon, banana, bar chart, baseball,
    basket, basketball, bat, bathtub, battery, beach with umbrella, bear, bed, beer mug, bell, bicycle, bikini, bird,
    birthday cake, black heart, blossom, blowfish, blue book, blue circle, blue heart, bomb, bouquet, bow and arrow,
    brain, bread, broccoli, broken heart, broom, bug, bus, butterfly, cactus, calendar, camel, camera, candle, candy,
    carrot, castle, cat, cat face, chair, check mark, cheese wedge, cherries, cherry blossom, chicken, chocolate bar,
    christmas tree, church, clapping hands, closed book, cloud, clown face, cocktail glass, coconut, compass,
    computer mouse, cookie, cooking, cow face, crab, crayon, credit card, crescent moon, croissant, cross mark,
    crossed swords, crown, crying face, cucumber, cupcake, deciduous tree, deer, delivery truck, dog, dog face,
    dollar banknote, dolphin, door, doughnut, dragon face, dress, droplet, drum, duck, eagle, ear, ear of corn, egg,
    eggplant, electric plug, elephant, envelope, evergreen tree, eye, face blowing a kiss, face with medical mask,
    face with tears of joy, fearful face, fire, fire engine, fish, fishing pole, flashlight, flying saucer,
    four leaf clover, fox, french fries, frog, full moon, game die, garlic, gear, gem stone, ghost, giraffe,
    glass of milk, glasses, globe showing americas, gloves, glowing star, goat, grapes, green apple, green circle,
    green heart, grinning face, grinning face with big eyes, grinning squinting face, guitar, hamburger, hammer,
    handbag, headphone, heart with arrow, hedgehog, helicopter, hibiscus, high heeled shoe, high voltage, honey pot,
    honeybee, horse face, hospital, hot beverage, hot dog, hot pepper, hourglass done, house, house with garden,
    ice cream, jack o lantern, jeans, key, keyboard, kite, kiwi fruit, koala, lady beetle, laptop, lemon, light bulb,
    lion, lipstick, locked, locomotive, lollipop, loudly crying face, luggage, magnet, mango, mantelpiece clock,
    maple leaf, microphone, microscope, mirror, mobile phone, money bag, monkey face, motorcycle, mountain, mouse,
    mouse face, mouth, mushroom, musical note, nerd face, neutral face, newspaper, no entry, octopus,
    office building, ok hand, onion, open book, orange circle, orange heart, owl, package, paintbrush, palm tree,
    pancakes, panda, paperclip, party popper, peach, pear, pencil, penguin, pie, pig face, pile of poo, pill,
    pineapple, pizza, polar bear, police car, popcorn, potato, potted plant, pretzel, princess, purple circle,
    purple heart, pushpin, puzzle piece, rabbit, rabbit face, radio, rainbow, raised fist, red apple, red circle,
    red heart, ring, robot, rocket, rooster, rose, running shoe, sailboat, sandwich, santa claus, scarf, school,
    scissors, seedling, shark, shield, ship, shopping cart, shortcake, skull, sleeping face, slightly smiling face,
    smiling face with heart eyes, smiling face with horns, smiling face with smiling eyes,
    smiling face with sunglasses, snail, snake, snow capped mountain, snowflake, snowman, soap, soccer ball, socks,
    soft ice cream, sparkling heart, spider, spouting whale, star, stop sign, strawberry, sun, sun behind cloud,
    sun with face, sunflower, sunglasses, syringe, t shirt, taco, tangerine, taxi, teacup without handle, teddy bear,
    telephone, telescope, television, tennis, tent, thermometer, thinking face, thumbs down, thumbs up, tiger face,
    toilet, tomato, tooth, toothbrush, top hat, tractor, trophy, tropical fish, trumpet, tulip, turtle, two hearts,
    umbrella, umbrella with rain drops, unicorn, victory hand, video game, violin, volcano, warning, wastebasket,
    watch, water wave, watermelon, waving hand, white heart, wine glass, winking face, wolf, wrapped gift, wrench,
    yellow circle, yellow heart, yo yo, zebra
"""
COMMON = frozenset(re.split(r",\s*", COMMON_NAMES.strip()))

# Everyday words for common things whose Unicode label is longer or different.
EVERYDAY_WORDS = {
    "automobile": "car", "red heart": "heart", "deciduous tree": "tree", "red apple": "apple", "sailboat": "boat",
    "mantelpiece clock": "clock", "alarm clock": "clock", "crescent moon": "moon", "full moon": "moon",
    "open book": "book", "blossom": "flower", "rosette": "flower", "tulip": "flower", "birthday cake": "cake",
    "grinning face": "smiley", "slightly smiling face": "smile", "mobile phone": "phone", "laptop": "computer",
    "airplane": "plane", "wrapped gift": "gift", "umbrella with rain drops": "umbrella",
    "locked": "lock", "high voltage": "lightning", "hamburger": "burger", "hot beverage": "coffee",
    "beer mug": "beer", "wine glass": "wine", "spouting whale": "whale",
    "soccer ball": "football", "sparkles": "stars", "droplet": "drop", "snowman without snow": "snowman",
    "mouse face": "mouse", "rabbit face": "bunny", "pig face": "pig", "cow face": "cow", "bear": "bear face",
    "robot": "robot face", "fire": "flame",
    "cooking": "fried egg", "bread": "loaf of bread", "cheese wedge": "cheese", "poultry leg": "chicken leg",
    "front facing baby chick": "chick", "lady beetle": "ladybug", "honeybee": "bee", "t shirt": "shirt",
    "running shoe": "shoe", "top hat": "hat", "television": "tv", "bookmark tabs": "document",
}  # fmt: skip

# Maximum number of concepts of a usable tag: a tag of few concepts names them ("car" for "automobile").
MAX_TAG_CONCEPTS = 6
