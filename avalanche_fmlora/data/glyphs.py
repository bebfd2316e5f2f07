"""Characters as classes: two benchmarks that need no download, and the characters kept apart for pretraining.

Image k of a class depends on the seed, the class, the split and k alone, on any processor: images are calculated in
double precision and rounded to 8 bits, so what one processor rounds otherwise than the next is lost in that step.

Test images of a class use one cut (a weight and a slant, drawn for each class) of the three DejaVu families (sans,
mono, serif), training images the nine other faces. What makes the frozen backbone fall short can be learned: it was
pretrained on filled strokes, while split_glyphs draws broken outlines and domain_glyphs has a drawing style for each
domain. No two classes look alike, nor a class like a pretraining character, in any size or face: blurred masks of two
correlate by less than 0.9, those of two classes turned by quarters or reflected by less than 0.95.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .base import Domain, ImageSet, class_incremental, domain_incremental, require_division
from .glyph_render import FACES, FAMILIES, GLYPH_MEAN, GLYPH_STD, IMAGE_SIZE, draw_looks, glyph_mask
from .glyph_styles import STYLES, Style, broken_outline

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
DIFFICULTY = {"split_glyphs": 0.6, "domain_glyphs": 1.0}
"""Of the looks, see :func:`~avalanche_fmlora.data.glyph_render.draw_looks`."""

SPLITS = ("train", "test")


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
    require_counts(image_size, train_per_class, test_per_class)
    require_division("split_glyphs", len(SPLIT_CHARACTERS), n_experiences)
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
        extra=rendering_facts(seed, difficulty=DIFFICULTY["split_glyphs"]),
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
    require_counts(image_size, train_per_class, test_per_class)
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
        extra=rendering_facts(seed, difficulty=DIFFICULTY["domain_glyphs"]),
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
    if style is None:
        return drawn_glyph(
            char, index, split, broken_outline, DIFFICULTY["split_glyphs"], stream=0, seed=seed, image_size=image_size
        )
    stream = 1 + list(STYLES).index(style)
    return drawn_glyph(
        char, index, split, STYLES[style], DIFFICULTY["domain_glyphs"], stream=stream, seed=seed, image_size=image_size
    )


def drawn_glyph(
    char: str, index: int, split: str, draw: Style, difficulty: float, *, stream: int, seed: int, image_size: int
) -> np.ndarray:
    """An image of the class `char`, uint8 [image_size, image_size, 3], in a look of its own that `draw` makes visible.

    Args:
        char: one character.
        index: of the image in its class and split.
        split: "train" or "test".
        draw: a mask [1, 1, H, W] in [0, 1] and a look -> an image [1, 3, IMAGE_SIZE, IMAGE_SIZE] in [0, 1].
        difficulty: of the look, see :func:`~avalanche_fmlora.data.glyph_render.draw_looks`.
        stream: of random numbers; one for each kind of image.
        seed: of the renderings.
        image_size: side of the result.
    """
    faces = faces_of(char, split, seed)
    rng = np.random.default_rng((seed, ord(char), stream, SPLITS.index(split), index))
    # In double precision no processor's rounding reaches an 8-bit pixel, once exact halves are out of the way (below).
    mask = torch.tensor(glyph_mask(char, faces[index % len(faces)]))[None, None].double() / 255
    image = draw(mask, draw_looks(rng, 1, difficulty).astype(np.float64))
    if image_size != IMAGE_SIZE:
        image = F.interpolate(image, size=(image_size, image_size), mode="bilinear", antialias=True).clamp(0, 1)
    pixels: np.ndarray = (image[0] * 255 + 1e-6).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return pixels


@lru_cache(maxsize=32)
def _images(chars: str, style: str | None, split: int, count: int, seed: int, image_size: int) -> ImageSet:
    """`count` images of each of `chars`, class after class; read-only, since all callers share it."""
    common: dict[str, Any] = {"split": SPLITS[split], "style": style, "seed": seed, "image_size": image_size}
    return class_after_class([glyph_image(c, k, **common) for c in chars for k in range(count)], count)


def class_after_class(drawn: Sequence[np.ndarray], count: int) -> ImageSet:
    """Images of which each `count` in turn are a class; read-only."""
    images, labels = np.stack(drawn), np.arange(len(drawn)) // count
    images.flags.writeable = labels.flags.writeable = False
    return ImageSet(images, labels)


def require_counts(image_size: int, train_per_class: int, test_per_class: int) -> None:
    for name, value, least in (
        ("image_size", image_size, 8),
        ("train_per_class", train_per_class, 1),
        ("test_per_class", test_per_class, 1),
    ):
        if value < least:
            raise ValueError(f"Expected `{name}` to be at least {least} but got {value}.")


def rendering_facts(seed: int, **looks: Any) -> dict[str, Any]:
    """What the pixels depend on beside the arguments that the record has already; `looks` as they come."""
    import matplotlib
    from PIL import __version__ as pillow
    from PIL import features

    return {
        "render_seed": seed,
        **looks,
        "pillow": pillow,
        "freetype": features.version("freetype2"),
        "matplotlib": matplotlib.__version__,
    }
