"""Characters as classes: two benchmarks that need no download, and the characters kept apart for pretraining.

Image k of a class depends on the seed, the class, the split and k alone, on any processor: images are calculated in
double precision and rounded to 8 bits, so what one processor rounds otherwise than the next is lost in that step.

Test images of a class use one cut (a weight and a slant, drawn for each class) of the three DejaVu families (sans,
mono, serif), training images the nine other faces. What makes the frozen backbone fall short can be learned: it was
pretrained on filled strokes, while split_glyphs draws broken outlines and domain_glyphs has a drawing style for each
domain. No two classes look alike, nor a class like a pretraining character: their ``likeness`` stays below
:data:`MAX_LIKENESS`, and below :data:`MAX_MIRRORED_LIKENESS` for classes turned by quarters or reflected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Domain, ImageSet, class_incremental, domain_incremental
from .glyph_render import (
    FACES,
    FAMILIES,
    GLYPH_MEAN,
    GLYPH_STD,
    IMAGE_SIZE,
    Look,
    colour,
    draw_looks,
    glyph_mask,
    layers,
    place,
    render,
    soften,
    spread_field,
    waves,
)

SPLIT_CHARACTERS = (
    "!#$&25?@CKLMVYaeghntwz¶ÆŒƈƑƙƛƝƤƩƴƼȡȤȹȼȾɀɚɝɠɧɬɱɷɻʄʐʓʝʥʧʩʪʬϟϸϻДХЯчщъьэџғҘӄӇӕӷԴԶԷԽԾՀՄՐղչֆდვპსᴗᴞᴻ∞♣♫ⱷⱾꞐꞪ"
)
"""The 100 classes of :func:`split_glyphs`."""
DOMAIN_CHARACTERS = "%46DƓƢƫȵɮʕТҲӌԐԿՎგლ♀ⱹ"
"""The 20 classes of :func:`domain_glyphs`."""
PRETRAINING_CHARACTERS = (
    "(+;<>¤©«¬®°±»ßøƜƦƾȜȴȺɂɃɄɌɕɤɲʁʅʍʞʤʨʫʭʯΔΞαζμρϗϙϡϢϤЂЉЋЖЫлњѣѤѦѨѯѱѹѼѿ҂ҊґҗҤҼҾӆԂԄԇԒԗԘԢԤԸԹԺՁՃՊՖ՛"
    "՝՞՟թխջփ։ႤႥႦႧႨႵႾჀჁჄჅორფჭჴჸ჻ᐉᐐᐑᐒᐔᐕᐖᐘᐙᐚᐣᐬᐮᐴᐻᐿᑀᑃᑑᑟᑢᑰᑴᑷᑸᑺᑼᑽᑿᒀᒅᒇᒘᒜᒢᒭᒲᒷᒺᓁᓃᓉᓊᓋᓍᓎᓔᓜᓝᓟᓡᓧᓨᓬᓭᓯᓵᓹᓺᔃᔅᔇ"
    "ᔐᔔᔙᔚᔤᔦᔨᔯᔱᔴᔵᔶᔸᔹᔼᕃᕄᕆᕈᕌᕏᕖᕧᕨᕩᕶᕷᕺᖀᖂᖃᖋᖍᖎᖏᖑᖓᖖᖡᖢᖣᖤᖧᖪᙰᙱᙳᙶᴖᴝᴟ₤₦₪€₯₲₵₹℗℟℣℥℧℮℺ↅ↔↖↗↘↙↜↝↟↡↤↦↧↨↩↪↫↬↯↰↱↲"
    "↳↴↶↷↸↹↺↻↽⇀⇄⇅⇆⇇⇈⇉⇊⇐⇑⇒⇖⇗⇘⇙⇚⇛⇜⇝⇣⇤⇥⇩⇪⇫⇭⇮⇰⇱⇲⇳⇵⇶⇷⇸∈∓∗√∜∝∠∡∧∴∸∹∺∻∼∽≃≅≋≌≍≎≏≐≑≒≓≔≗≘≛≝≡≤≥≬≲≳≶≼≾⊆⊇⊍"
    "⊏⊐⊑⊒⊔⊜⊝⊞⊠⊡⊢⊣⊥⊨⊩⊪⊰⊵⊻⊾⋊⋋⋑⋒⋘⋙⋛⋟⋧⋨⋰⋲⋵⋶⋹⋾⋿␣▣▦▭▯▱▲▸▹▼▿◁◂◉◊○◌◐◑◒◓◔◕◙◜◝◞◟◠◢◣◤◥◧◨◩◪◫◬◭◮◰◱◲◳◴◵◶◷◸◹"
    "◺◻◿☀☃☄☆☇☏☔☖☙☛☝☟☩☭☯☱☲☴☸☹☼☽☾☿♂♃♄♅♆♇♈♉♊♋♍♎♏♐♑♡♢♤♥♦♧♨♪♬♭♮♯♱♲♳♻♼♽⚐⚑⚓⚗⚘⚙⚟⚡⚥⚦⚨⚯⚳⚵⚶⚷⛁⛃✁✂✃✇✈✍✎✑✔✗"
    "✞✟✡✦✧✩✫✮✿❀❅❆❉❍❑❛❧❨❩❯➝➫➬➭➯➲➷➽⟧⟩⟫⟰⟳⟴⟶⤋⦃⧏⧑⧺⨑⨒⨯⩪⩫⩿⪀⪁⪃⪅⪇⪉⪊⪋⪎⪒⪖⪚⪜⪠⪮⪯⪰⪳⫺⬈⬉⬊⬋⬌⬐⬒⬓⬔⬕⬖⬗⬘⬙⬚⭔Ɽⱴⴀⴂⴆⴎⴐ"
    "ⴓⴚⴡⴢⴥ⸟⸣ꙣꙤꜨꜶꜸꝈꝐꝒꞂꞨ𐌅𐌋𐌌𐌔𐌕𐌛"
)
"""What the packaged backbone was pretrained on: no class of either benchmark looks like one of these."""
MAX_LIKENESS = 0.9
MAX_MIRRORED_LIKENESS = 0.95
DIFFICULTY = {"split_glyphs": 0.6, "domain_glyphs": 1.0}
"""Of the looks, see :func:`~avalanche_fmlora.data.glyph_render.draw_looks`."""

Style = Callable[[Tensor, Look], Tensor]
_SPLITS = ("train", "test")


def split_glyphs(
    *,
    n_experiences: int = 10,
    class_order_seed: int | None = None,
    image_size: int = IMAGE_SIZE,
    train_per_class: int = 36,
    test_per_class: int = 10,
    seed: int = 0,
    mean: Sequence[float] = GLYPH_MEAN,
    std: Sequence[float] = GLYPH_STD,
) -> Any:
    """100 characters in `n_experiences` of equal size, class-incremental.

    Args:
        n_experiences: must divide 100.
        class_order_seed: seeds the class order; None keeps the order of :data:`SPLIT_CHARACTERS`.
        image_size: side of the images; they are rendered with 32 and resized to any other.
        train_per_class: training images of each class.
        test_per_class: test images of each class, in faces that no training image of the class uses.
        seed: of the renderings.
        mean: of each channel in [0, 1], subtracted; the default is that of the packaged backbone.
        std: of each channel, divided by.

    Returns:
        An Avalanche benchmark with ``info``, see :func:`~avalanche_fmlora.data.base.class_incremental`.

    Raises:
        ValueError: if a count is below 1, `image_size` below 8 or the classes can't be divided.
    """
    _require(image_size, train_per_class, test_per_class)
    counts = (train_per_class, test_per_class)
    train, test = (_images(SPLIT_CHARACTERS, None, s, counts[s], seed, image_size) for s in range(2))
    return class_incremental(
        "split_glyphs",
        train,
        test,
        list(SPLIT_CHARACTERS),
        n_experiences=n_experiences,
        class_order_seed=class_order_seed,
        mean=mean,
        std=std,
        extra=_facts("split_glyphs", seed),
    )


def domain_glyphs(
    *,
    class_order_seed: int | None = None,
    image_size: int = IMAGE_SIZE,
    train_per_class: int = 72,
    test_per_class: int = 10,
    seed: int = 0,
    mean: Sequence[float] = GLYPH_MEAN,
    std: Sequence[float] = GLYPH_STD,
) -> Any:
    """20 characters drawn in five styles (:data:`STYLES`), one experience a style, domain-incremental.

    `class_order_seed` draws the order of the styles; `train_per_class` and `test_per_class` count the images of a class
    in one style. All else is as in :func:`split_glyphs`.
    """
    _require(image_size, train_per_class, test_per_class)
    counts = (train_per_class, test_per_class)
    domains = [
        Domain(name, *(_images(DOMAIN_CHARACTERS, name, s, counts[s], seed, image_size) for s in range(2)))
        for name in STYLES
    ]
    return domain_incremental(
        "domain_glyphs",
        domains,
        list(DOMAIN_CHARACTERS),
        class_order_seed=class_order_seed,
        mean=mean,
        std=std,
        extra=_facts("domain_glyphs", seed),
    )


def faces_of(char: str, split: str, seed: int = 0) -> tuple[str, ...]:
    """The faces of a class in `split` ("train" or "test") for one `seed` of the renderings.

    >>> set(faces_of("g", "train")) & set(faces_of("g", "test"))
    set()
    """
    cut = int(np.random.default_rng((seed, ord(char))).integers(4))
    held_out = tuple(faces[cut] for faces in FAMILIES.values())
    return held_out if split == "test" else tuple(face for face in FACES if face not in held_out)


def glyph_image(
    char: str, index: int, split: str, *, style: str | None = None, seed: int = 0, image_size: int = IMAGE_SIZE
) -> np.ndarray:
    """Image `index` of the class `char` in `split`, uint8 [image_size, image_size, 3]; `style` None is split_glyphs."""
    faces = faces_of(char, split, seed)
    domain = 0 if style is None else 1 + list(STYLES).index(style)
    rng = np.random.default_rng((seed, ord(char), domain, _SPLITS.index(split), index))
    # In double precision no processor's rounding reaches an 8-bit pixel, once exact halves are out of the way (below).
    mask = torch.tensor(glyph_mask(char, faces[index % len(faces)]))[None, None].double() / 255
    look = draw_looks(rng, 1, DIFFICULTY["split_glyphs" if style is None else "domain_glyphs"]).astype(np.float64)
    image = (_broken_outline if style is None else STYLES[style])(mask, look)
    if image_size != IMAGE_SIZE:
        image = F.interpolate(image, size=(image_size, image_size), mode="bilinear", antialias=True).clamp(0, 1)
    pixels: np.ndarray = (image[0] * 255 + 1e-6).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return pixels


@lru_cache(maxsize=32)
def _images(chars: str, style: str | None, split: int, count: int, seed: int, image_size: int) -> ImageSet:
    """`count` images of each of `chars`, class after class; read-only, since all callers share it."""
    name = _SPLITS[split]
    images = np.stack(
        [glyph_image(c, k, name, style=style, seed=seed, image_size=image_size) for c in chars for k in range(count)]
    )
    images = np.ascontiguousarray(images)
    labels = np.repeat(np.arange(len(chars)), count)
    images.flags.writeable = labels.flags.writeable = False
    return ImageSet(images, labels)


def _require(image_size: int, train_per_class: int, test_per_class: int) -> None:
    for name, value, least in (
        ("image_size", image_size, 8),
        ("train_per_class", train_per_class, 1),
        ("test_per_class", test_per_class, 1),
    ):
        if value < least:
            raise ValueError(f"Expected `{name}` to be at least {least} but got {value}.")


def _facts(name: str, seed: int) -> dict[str, Any]:
    """What the pixels depend on beside the arguments that the record has already."""
    import matplotlib
    from PIL import __version__ as pillow
    from PIL import features

    return {
        "render_seed": seed,
        "difficulty": DIFFICULTY[name],
        "pillow": pillow,
        "freetype": features.version("freetype2"),
        "matplotlib": matplotlib.__version__,
    }


def _rgb(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None, None]


def _outline(alpha: Tensor) -> Tensor:
    return F.max_pool2d(alpha, 3, 1, 1) + F.max_pool2d(-alpha, 3, 1, 1)


def _grain(look: Look) -> Tensor:
    """The noise of the first channel, [1, 1, H, W], with variance 1."""
    noise = torch.from_numpy(look.noise[:, :1])
    return noise / noise.std().clamp_min(1e-6)


def _broken_outline(masks: Tensor, look: Look) -> Tensor:
    """A speckled outline in any colours on any paper: the look of split_glyphs."""
    alpha = _outline(place(masks, look)) * torch.sigmoid(4 * (_grain(look) + 0.5))
    paper, ink = layers(look)
    return (soften(paper + alpha * (ink - paper), 0.5 * look.blur) + 0.5 * torch.from_numpy(look.noise)).clamp(0, 1)


def _stamp(masks: Tensor, look: Look) -> Tensor:
    """A stamp's block, so mirrored, in dark ink on cream paper with fibres."""
    alpha = place(masks.flip(-1), look)
    fibres = 0.5 * torch.from_numpy(look.noise) + 0.5 * spread_field(look.texture)
    paper = _rgb(0.93, 0.88, 0.76) + 0.1 * (colour(look.paper) - 0.5) + fibres.mean(1, keepdim=True)
    pen = _rgb(0.12, 0.12, 0.28) + 0.3 * (colour(look.ink) - 0.4)
    return soften(paper + alpha * (pen - paper), look.blur).clamp(0, 1)


def _neon(masks: Tensor, look: Look) -> Tensor:
    """A glowing outline in the dark."""
    alpha = place(masks, look)
    outline = _outline(alpha)
    glow = F.avg_pool2d(outline, 7, 1, 3)
    tube = colour(look.ink / look.ink.max(1, keepdims=True).clip(0.2))
    night = 0.15 * colour(look.paper) + 0.6 * spread_field(look.texture)
    return (night + tube * (0.75 * outline + 0.7 * glow) + 0.5 * torch.from_numpy(look.noise)).clamp(0, 1)


def _chalk(masks: Tensor, look: Look) -> Tensor:
    """Broken strokes of pale chalk on a smeared green board."""
    alpha = place(masks, look)
    grain = _grain(look)
    covered = alpha * torch.sigmoid(4 * (grain + 0.1))
    board = _rgb(0.16, 0.3, 0.24) + 0.12 * (colour(look.paper) - 0.5) + spread_field(look.texture).mean(1, keepdim=True)
    chalk = 0.65 + 0.3 * colour(look.ink)
    return (board + covered * (chalk - board) + 0.06 * grain).clamp(0, 1)


def _stripes(masks: Tensor, look: Look) -> Tensor:
    """Stripes inside the character run across those outside; the mean colours differ little."""
    alpha = place(masks, look)
    plane = 1.1 * look.stripes[:, :2] / np.linalg.norm(look.stripes[:, :2], axis=1, keepdims=True).clip(1e-6)
    across = np.stack([-plane[:, 1], plane[:, 0]], 1)
    outside, inside = (waves(np.concatenate([p, look.stripes[:, 2:]], 1)) for p in (plane, across))
    middle = 0.5 + 0.3 * (colour(look.paper) - 0.5)
    tint = 1.0 * (colour(look.ink) - colour(look.paper))
    lines = 0.10 * (outside + alpha * (inside - outside))
    return (middle + alpha * tint + lines + 0.3 * torch.from_numpy(look.noise)).clamp(0, 1)


def _mosaic(masks: Tensor, look: Look) -> Tensor:
    """Square tiles of uneven colour."""
    picture = render(masks, look)
    tiles = F.interpolate(picture, size=(16, 16), mode="area")
    uneven = F.interpolate(torch.from_numpy(look.noise), size=(16, 16), mode="nearest")
    return F.interpolate(tiles + 0.4 * uneven, size=(IMAGE_SIZE, IMAGE_SIZE), mode="nearest").clamp(0, 1)


STYLES: dict[str, Style] = {"stamp": _stamp, "neon": _neon, "chalk": _chalk, "stripes": _stripes, "mosaic": _mosaic}
"""The domains of :func:`domain_glyphs`, in their order."""
