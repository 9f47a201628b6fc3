"""Renders the sample data: pictures of streets, most with a zebra crossing, and questions about them.

    python -m tests.make_scenes

writes `train.jsonl`, `valid.jsonl` and `images/` into the project root, and `test.jsonl` with its own `images/` into
`tests/`, the same bytes every time with the same version of Pillow. The facts of a picture are drawn first
(`make_scene`), then rendered (`render`) and asked about (`questions`), so every answer is true. The sample data uses
seeds below 10_000; a program that wants other pictures takes seeds from 1_000_000 up.
"""

import json
import math
import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

ROOT = Path(__file__).resolve().parent.parent
SEEDS = {"train": range(1, 65), "valid": range(3000, 3024), "test": range(6000, 6012)}
FOLDERS = {"train": ROOT, "valid": ROOT, "test": ROOT / "tests"}

# The facts go round these lists as the seed grows. The lengths 7, 3, 5 and 8 share no factor, so any run of
# seeds holds nearly the same number of each value and of each pair of values.
STREETS = ("plain", "plain", "red", "red", "green", "green", "unsignalled")
CARS = ("waiting", "coming", None)
WALKERS = (0, 3, 1, 4, 2)
LIGHTS = ("day", "dusk", "day", "rain", "day", "dusk", "day", "rain")
SMALL_SIZES = ((320, 240), (400, 300), (480, 360), (300, 400), (360, 480))
LARGE_SIZES = ((640, 480), (768, 512), (512, 768), (800, 600), (560, 420))  # longer side of 512 or more

QUESTIONS = {
    "crossing": "Is there a crossing?",
    "signal": "What does the pedestrian signal show?",
    "people": "How many people are on the crossing?",
    "car": "Is a car waiting?",
    "safe": "Is it safe to cross, and why?",
}
COUNTS = ("Nobody.", "One person.", "Two people.", "Three people.", "Four people.")
SIGNALS = {"red": "The signal is red.", "green": "Green, walk.", None: "There is no signal."}
CAR_ANSWERS = {"waiting": "Yes, a car is waiting.", "coming": "No, a car is still coming.", None: "No car in sight."}


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `walkers_on` are on the crossing, `walkers_beside` on the sidewalks."""

    seed: int
    size: tuple[int, int]
    crossing: bool
    signal: str | None  # "red" or "green"
    walkers_on: int
    walkers_beside: int
    car: str | None  # "waiting" at the crossing or "coming" from afar
    light: str  # "day", "dusk" or "rain"


def make_scene(seed: int) -> Scene:
    """Draws the facts of one picture."""
    rng = random.Random(f"facts {seed}")
    street, car = STREETS[seed % len(STREETS)], CARS[seed % len(CARS)]
    crossing = street != "plain"
    if car == "waiting" and not crossing:
        car = rng.choice(("coming", None))
    return Scene(
        seed=seed,
        size=rng.choice(SMALL_SIZES + LARGE_SIZES),
        crossing=crossing,
        signal=street if street in ("red", "green") else None,
        walkers_on=WALKERS[seed % len(WALKERS)] if crossing else 0,
        walkers_beside=rng.randint(0, 3),
        car=car,
        light=LIGHTS[seed % len(LIGHTS)],
    )


def answers(scene: Scene) -> dict[str, str]:
    """The one right answer to each kind of question."""
    if not scene.crossing:
        safe = "No, there is no crossing."
    elif scene.signal == "red":  # reason enough, whatever the cars do
        safe = "No, the signal is red."
    elif scene.car == "coming":
        safe = "No, a car is coming."
    else:
        safe = "Yes, it is green and no car is coming." if scene.signal else "Yes, no car is coming."
    return {
        "crossing": "Yes, a zebra crossing." if scene.crossing else "No crossing here.",
        "signal": SIGNALS[scene.signal],
        "people": COUNTS[scene.walkers_on] if scene.crossing else "There is no crossing.",
        "car": CAR_ANSWERS[scene.car],
        "safe": safe,
    }


def questions(scene: Scene) -> list[tuple[str, str]]:
    """Four of the five questions with their answers."""
    # "Is there a crossing?" goes to both plain streets in seven and to two, in turn, of the five others.
    turn, place = divmod(scene.seed, len(STREETS))
    if scene.crossing and (turn + place) % 5 >= 2:
        skipped = "crossing"
    else:
        skipped = random.Random(f"questions {scene.seed}").choice(("signal", "people", "car", "safe"))
    right = answers(scene)
    return [(text, right[kind]) for kind, text in QUESTIONS.items() if kind != skipped]


# Rendering, in metres: x to the right of the middle of the road, y up from it, z away from the camera.

SKIES = {  # at the top, halfway and at the horizon
    "day": ((88, 150, 222), (150, 195, 236), (222, 235, 243)),
    "dusk": ((38, 42, 92), (128, 84, 128), (246, 158, 98)),
    "rain": ((112, 122, 134), (146, 155, 164), (182, 188, 194)),
}
CLOUDS = {"day": (255, 255, 255), "dusk": (240, 150, 130), "rain": (98, 106, 118)}
AMBIENT = {"day": (1, 1, 1), "dusk": (0.66, 0.6, 0.76), "rain": (0.76, 0.8, 0.84)}  # what is left of each channel
HAZE = {"day": 140, "dusk": 110, "rain": 60}  # metres over which two thirds of a colour are lost
HALO = {"day": 0.35, "dusk": 1.0, "rain": 0.8}  # around lamps
WALLS = ((186, 120, 96), (204, 178, 140), (150, 152, 160), (172, 148, 128), (126, 142, 150), (214, 200, 180))
# Cars and coats share no colour, so that someone in front of a car stands out.
COATS = ((214, 44, 60), (36, 92, 200), (244, 190, 40), (150, 60, 170), (236, 110, 40), (20, 140, 140), (240, 136, 170))
TROUSERS = ((32, 36, 58), (60, 48, 42), (54, 70, 110), (24, 24, 26))
SKINS = ((244, 208, 178), (224, 172, 130), (160, 108, 74), (104, 68, 48))
HAIRS = ((36, 26, 22), (98, 62, 34), (196, 152, 84), (126, 126, 128))
PAINTS = ((120, 176, 214), (30, 56, 104), (208, 212, 216), (176, 158, 118), (40, 120, 90), (92, 98, 108))
LAMPS = {"red": (255, 30, 24), "green": (20, 235, 95)}
STRIPES = (4.6, 7.4)  # where the crossing begins and ends
SIDEWALK = 2.7  # its width


def shade(colour, factor):
    return tuple(min(255, round(channel * factor)) for channel in colour)


class Canvas:
    """A picture of twice the final size, a layer of the lights in it, and the camera that sees both."""

    def __init__(self, scene: Scene):
        self.scene, self.rng = scene, random.Random(f"render {scene.seed}")
        self.width, self.height = (2 * side for side in scene.size)
        self.horizon = self.height * 2 // 5
        top, middle, self.far = SKIES[scene.light]
        self.image = Image.new("RGB", (self.width, self.height), self.far)
        gradient = Image.linear_gradient("L").resize((self.width, self.horizon))
        self.image.paste(ImageOps.colorize(gradient, top, self.far, middle))
        self.lights = Image.new("RGB", self.image.size)
        self.draw, self.draw_light = ImageDraw.Draw(self.image), ImageDraw.Draw(self.lights)
        # An upright picture shows a narrower street at a wider angle.
        self.focal = self.height * (0.85 if self.width > self.height else 0.7)
        self.centre, self.eye = self.width * self.rng.uniform(0.48, 0.52), self.rng.uniform(2.6, 2.85)
        self.kerb = 2 * self.width / self.focal  # half of the width of the road

    def at(self, x, y, z):
        """The pixel of a point."""
        return self.centre + self.focal * x / z, self.horizon + self.focal * (self.eye - y) / z

    def paint(self, shape, points, colour, z, light=None, **options):
        """Draws a shape in the tone of its distance. What gives no light hides the lights behind it."""
        near = math.exp(-z / HAZE[self.scene.light])
        channels = zip(colour, AMBIENT[self.scene.light], self.far, strict=True)
        tone = tuple(round(near * own * ambient + (1 - near) * far) for own, ambient, far in channels)
        getattr(self.draw, shape)(points, fill=light or tone, **options)
        getattr(self.draw_light, shape)(points, fill=light or (0, 0, 0), **options)

    def face(self, corners, colour, light=None):
        z = sum(corner[2] for corner in corners) / len(corners)
        self.paint("polygon", [self.at(*corner) for corner in corners], colour, z, light)

    def panel(self, x0, x1, y0, y1, z0, z1, colour, inset=0.0):
        """A face from its near edge, low, to its far one, narrower by `inset` on either side."""
        self.face([(x0, y0, z0), (x1, y0, z0), (x1 - inset, y1, z1), (x0 + inset, y1, z1)], colour)

    def wall(self, x, y0, y1, z0, z1, colour, light=None):
        self.face([(x, y0, z0), (x, y0, z1), (x, y1, z1), (x, y1, z0)], colour, light)

    def ground(self, x0, x1, z0, z1, colour):
        self.panel(x0, x1, 0, 0, z0, z1, colour)

    def box(self, x0, x1, y0, y1, z0, z1, colour):
        """The side towards the middle of the road, the top and the front of a box."""
        self.wall(x0 if x0 + x1 > 0 else x1, y0, y1, z0, z1, shade(colour, 0.72))
        if y1 < self.eye:
            self.panel(x0, x1, y1, y1, z0, z1, shade(colour, 1.12))
        self.panel(x0, x1, y0, y1, z0, z0, colour)

    def disc(self, x, y, z, rx, ry, colour, light=None):
        self.paint("ellipse", [self.at(x - rx, y + ry, z), self.at(x + rx, y - ry, z)], colour, z, light)

    def limb(self, points, z, thick, colour):
        """A line with round ends through points (x, y)."""
        width = max(1, round(thick * self.focal / z))
        self.paint("line", [self.at(x, y, z) for x, y in points], colour, z, width=width, joint="curve")
        for x, y in points:
            self.disc(x, y, z, thick / 2, thick / 2, colour)


def draw_clouds(canvas):
    """Soft clouds, and at dusk a low sun."""
    rng, mask = canvas.rng, Image.new("L", canvas.image.size)
    for _ in range(5):
        x, y, wide = rng.uniform(0, canvas.width), rng.uniform(0, 0.3) * canvas.height, canvas.height * 0.12
        for _ in range(6):
            left, top, r = x + rng.uniform(-wide, wide), y + rng.uniform(-wide, wide) / 5, rng.uniform(0.4, 1) * wide
            ImageDraw.Draw(mask).ellipse([left, top, left + r, top + r / 2], fill=170)
    canvas.image.paste(CLOUDS[canvas.scene.light], mask=mask.filter(ImageFilter.GaussianBlur(canvas.height / 60)))
    if canvas.scene.light == "dusk":
        canvas.disc(rng.uniform(-8, 8), 6, 100, 4, 4, (0, 0, 0), light=(255, 214, 140))


def draw_ground(canvas):
    """Sidewalks, kerbs, the road with its markings and, on most streets, the stripes of a crossing."""
    rng, kerb = canvas.rng, canvas.kerb
    asphalt = shade((84, 86, 92), rng.uniform(0.85, 1.1))
    paving = shade(rng.choice(((186, 180, 170), (172, 166, 160), (192, 176, 160))), rng.uniform(0.92, 1.05))
    for far, near in pairwise(2.5 * 1.13**row for row in range(40, -1, -1)):  # in rows, each of one tone
        canvas.ground(-999, 999, near, far, paving)
        canvas.ground(-kerb - 0.22, kerb + 0.22, near, far, (216, 214, 208))
        canvas.ground(-kerb, kerb, near, far, shade(asphalt, 0.6))
        canvas.ground(0.12 - kerb, kerb - 0.12, near, far, shade(asphalt, 1 + 0.05 * math.sin(9 * near)))
    for z in range(3, 40):  # joints of the paving
        for side in (-1, 1):
            canvas.ground(side * (kerb + 0.22), side * (kerb + SIDEWALK), z, z + 0.03, shade(paving, 0.82))
    for _ in range(70):  # worn spots
        z, wide, x = rng.uniform(3, 25), rng.uniform(0.1, 0.5), rng.uniform(0.2 - kerb, kerb - 0.7)
        canvas.ground(x, x + wide, z, z + wide * 0.7, shade(asphalt, rng.uniform(0.93, 1.06)))
    for dash in range(28):
        z = (STRIPES[1] + 1 if canvas.scene.crossing else 2.5) + 3 * dash
        canvas.ground(-0.07, 0.07, z, z + 1.6, (226, 226, 220))
    stripes = round(2 * kerb) if canvas.scene.crossing else 0  # half a metre each, with gaps as wide
    for stripe in range(stripes):
        x = kerb * ((2 * stripe + 0.5) / stripes - 1)
        canvas.ground(x, x + kerb / stripes, *STRIPES, shade((246, 246, 242), rng.uniform(0.95, 1)))


def draw_houses(canvas):
    """A row of houses along each sidewalk, from the far end of the street to the near one."""
    rng, lit_part = canvas.rng, 0.3 if canvas.scene.light == "dusk" else 0
    for side in (-1, 1):
        x, far = side * (canvas.kerb + SIDEWALK), 100.0
        while far > 9:
            near, floors = max(far - rng.uniform(7, 14), 5), rng.randint(2, 5)
            wall = shade(rng.choice(WALLS), rng.uniform(0.85, 1.1))
            canvas.box(*sorted((x, 3 * x)), 0, 3.2 * floors + 0.8, near, far, wall)
            for floor in range(floors):
                for window in range(int((far - near) / 2.4)):
                    y, z = 3.2 * floor + 1.1, near + 0.8 + 2.4 * window
                    glass, light = shade((92, 112, 134), rng.uniform(0.8, 1.1)), (255, 206, 120)
                    canvas.wall(x, y, y + 1.6, z, z + 1.2, glass, light if rng.random() < lit_part else None)
            far = near - rng.choice((0, 0, 3))


def draw_tree(canvas, x, z):
    rng, green = canvas.rng, shade((74, 128, 62), canvas.rng.uniform(0.8, 1.15))
    canvas.limb([(x, 0), (x, 2.6)], z, 0.25, (92, 70, 52))
    for puff in range(12):  # the lighter ones last, on top
        r = rng.uniform(0.4, 0.8)
        y = 3.7 + rng.uniform(-0.9, 0.9) + puff / 20
        canvas.disc(x + rng.uniform(-0.9, 0.9), y, z, r, r, shade(green, 0.7 + 0.04 * puff))


def draw_signal(canvas, x, z):
    """A pole with a box of two lamps: a standing figure above, a walking one below."""
    canvas.limb([(x, 0), (x, 2.4)], z, 0.13, (70, 74, 78))
    canvas.panel(x - 0.46, x + 0.46, 2.22, 3.88, z, z, (238, 238, 232))
    canvas.panel(x - 0.41, x + 0.41, 2.27, 3.83, z, z, (22, 24, 26))
    for name, y, stride in (("red", 3.44, 0.05), ("green", 2.66, 0.13)):
        lit = canvas.scene.signal == name
        canvas.disc(x, y, z, 0.36, 0.36, (48, 50, 52), LAMPS[name] if lit else None)
        ink = (12, 14, 14) if lit else (30, 32, 33)
        canvas.disc(x, y + 0.22, z, 0.07, 0.07, ink)
        for foot in (-stride, stride):
            canvas.limb([(x + foot / 3, y + 0.08), (x, y - 0.05), (x + foot, y - 0.26)], z, 0.075, ink)
            canvas.limb([(x, y + 0.1), (x + foot * 1.3, y - 0.06)], z, 0.06, ink)


def draw_car(canvas, x, z):
    """A car that faces the camera."""
    rng, half = canvas.rng, min(1.08, canvas.kerb * 0.42)  # half of its width
    low, high, top = half * 0.94, half * 0.78, rng.uniform(1.65, 1.85)  # of the cabin
    paint, glass = rng.choice(PAINTS), (60, 78, 94)
    lit = canvas.scene.car == "coming" or canvas.scene.light != "day"
    canvas.ground(x - half - 0.15, x + half + 0.15, z - 0.25, z + 4.2, (38, 40, 44))  # shadow
    for wheel in (x - half, x + half - 0.3):
        canvas.box(wheel, wheel + 0.3, 0, 0.5, z + 0.1, z + 0.8, (22, 22, 24))
    canvas.box(x - half, x + half, 0.25, 1, z, z + 4.2, paint)
    outline = ((low, 1, z + 3.9), (high, top, z + 3.3), (high, top, z + 1.7), (low, 1, z + 0.9))
    canvas.face([(x - math.copysign(across, x), y, far) for across, y, far in outline], shade(glass, 0.75))
    canvas.panel(x - high, x + high, top, top, z + 1.7, z + 3.3, paint)
    canvas.panel(x - low, x + low, 1, top, z + 0.9, z + 1.7, paint, low - high)
    canvas.panel(x - low + 0.1, x + low - 0.1, 1.05, top - 0.07, z + 0.95, z + 1.6, glass, low - high)
    canvas.panel(x - half / 2, x + half / 2, 0.55, 0.82, z, z, (34, 36, 40))  # grille, plate
    canvas.panel(x - 0.28, x + 0.28, 0.34, 0.5, z, z, (240, 240, 236))
    for lamp in (-0.76, 0.76):
        canvas.disc(x + lamp * half, 0.72, z, 0.18, 0.14, (222, 226, 230), (255, 244, 205) if lit else None)


def draw_walker(canvas, x, z):
    """Someone in mid-stride, seen from the side."""
    rng, tall, ahead = canvas.rng, canvas.rng.uniform(0.94, 1.06), canvas.rng.choice((-1, 1))
    coat, trousers, skin, hair = (rng.choice(colours) for colours in (COATS, TROUSERS, SKINS, HAIRS))

    def limb(thick, colour, *points):
        canvas.limb([(x + ahead * across, up * tall) for across, up in points], z, thick, colour)

    canvas.disc(x, 0.02, z, 0.42, 0.07, (46, 48, 52))  # shadow
    stride = rng.uniform(0.2, 0.3)
    for step, tone in ((-stride, 0.75), (stride, 1)):  # the far leg, then the near one
        limb(0.17, shade(trousers, tone), (0, 0.86), (step * 0.6 + 0.04, 0.48), (step, 0.09))
        limb(0.1, (26, 24, 26), (step, 0.05), (step + 0.13, 0.05))
    limb(0.12, shade(coat, 0.7), (0, 1.36), (-0.2, 1.1), (-0.16, 0.9))
    limb(0.36, coat, (0.02, 1.26), (0, 0.92))
    limb(0.12, shade(coat, 0.82), (0, 1.36), (0.1, 1.1), (0.26, 0.96))
    limb(0.09, skin, (0.28, 0.95))
    limb(0.29, hair, (-0.02, 1.65))
    limb(0.24, skin, (0.04, 1.6))


def place_things(canvas):
    """What stands or moves on the street, the farthest first: (distance, x, what draws it)."""
    scene, rng, kerb = canvas.scene, canvas.rng, canvas.kerb
    things = [(rng.uniform(13, 60), side * (kerb + 0.9), draw_tree) for side in (-1, -1, -1, 1, 1, 1)]
    side = rng.choice((-1, 1))
    if scene.signal:
        things.append((6.4, side * (kerb + 0.55), draw_signal))
    if scene.car:
        distance = STRIPES[1] + rng.uniform(0.5, 0.9) if scene.car == "waiting" else rng.uniform(14, 18)
        things.append((distance, rng.choice((-1, 1)) * kerb / 2, draw_car))
    for slot in rng.sample((-0.72, -0.24, 0.24, 0.72), scene.walkers_on):
        things.append((rng.uniform(5.5, 6.7), kerb * (slot + rng.uniform(-0.06, 0.06)), draw_walker))
    # Those beside go away from the kerb with their distance: nobody on the crossing hides them.
    for distance, across in ((7.2, 1.32), (9, 1.46), (12, 1.68))[: scene.walkers_beside]:
        side = -side  # the first one across the road from the signal
        x = side * kerb * (across + rng.uniform(-0.04, 0.04))
        things.append((distance + rng.uniform(-0.3, 0.3), x, draw_walker))
    return sorted(things, key=lambda thing: -thing[0])


def finish(canvas):
    """Halos around the lights, rain, and the final size."""
    image, rng = canvas.image, canvas.rng
    for radius in (canvas.height / 150, canvas.height / 45):
        halo = canvas.lights.filter(ImageFilter.GaussianBlur(radius))
        image = ImageChops.screen(image, halo.point(lambda value: value * HALO[canvas.scene.light]))
    if canvas.scene.light == "rain":
        streaks = Image.new("L", image.size)
        for _ in range(220):
            x, y = rng.uniform(0, canvas.width), rng.uniform(-0.1, 1) * canvas.height
            long = canvas.height * rng.uniform(0.02, 0.06)
            ImageDraw.Draw(streaks).line([x, y, x - long / 5, y + long], fill=110, width=2 + canvas.height // 800)
        image.paste((226, 232, 238), mask=streaks)
    return image.reduce(2)


def render(scene: Scene) -> Image.Image:
    """The picture of a scene, always the same for the same scene."""
    canvas = Canvas(scene)
    draw_clouds(canvas)
    draw_ground(canvas)
    draw_houses(canvas)
    for distance, x, draw in place_things(canvas):
        draw(canvas, x, distance)
    return finish(canvas)


def main():
    for split, seeds in SEEDS.items():
        folder = FOLDERS[split]
        (folder / "images").mkdir(exist_ok=True)
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n") as lines:
            for number, seed in enumerate(seeds, 1):
                scene, path = make_scene(seed), f"images/{split}_{number:03}.jpg"
                render(scene).save(folder / path, quality=80)
                for question, answer in questions(scene):
                    line = {"image_path": path, "question": question, "answer": answer}
                    lines.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
