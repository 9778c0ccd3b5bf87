"""Plain background colors of icons, under their names in captions."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (25, 25, 28),
    "grey": (150, 152, 156),
    "red": (214, 64, 60),
    "orange": (240, 150, 60),
    "yellow": (248, 214, 90),
    "green": (90, 170, 90),
    "blue": (74, 128, 214),
    "light blue": (170, 210, 242),
    "purple": (140, 96, 190),
    "pink": (242, 160, 190),
    "brown": (140, 100, 70),
}
