"""The language-consistency reward: 27 languages, mixtures, what is no word, attacks."""

from __future__ import annotations

import json
import statistics
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1kern.errors import UserError
from r1kern.rewards.language import LANGUAGES, consistency
from r1kern.rewards.prose import prose

SENTENCES = {
    "en": [
        "Let me think about this. First, we add three apples and two oranges, then divide by five.",
        "Wait, let me re-evaluate: the numerator is divisible by the denominator.",
        "THE ANSWER TO THIS QUESTION IS TWENTY.",
    ],
    "de": [
        "Zuerst addieren wir drei Äpfel und zwei Orangen, dann teilen wir durch fünf.",
        "Warte, ich überprüfe das noch einmal: der Zähler ist durch den Nenner teilbar.",
        "Also, die Antwort war in der Tat vier, das hat er am Ende so gesagt.",
        "Das Team hat den Computer im Internet gekauft und ein Update installiert.",
    ],
    "fr": [
        "D'abord, nous additionnons trois pommes et deux oranges, puis nous divisons par cinq.",
        "Attends, vérifions encore : le numérateur est divisible par le dénominateur.",
    ],
    "es": [
        "Primero sumamos tres manzanas y dos naranjas, luego dividimos entre cinco.",
        "Espera, déjame comprobarlo otra vez: el numerador es divisible por el denominador.",
    ],
    "pt": [
        "Primeiro somamos três maçãs e duas laranjas, depois dividimos por cinco.",
        "Espere, deixe-me verificar de novo: o numerador é divisível pelo denominador.",
    ],
    "it": [
        "Prima sommiamo tre mele e due arance, poi dividiamo per cinque.",
        "Aspetta, controlliamo di nuovo: il numeratore è divisibile per il denominatore.",
    ],
    "nl": ["Eerst tellen we drie appels en twee sinaasappels op en dan delen we door vijf."],
    "sv": ["Först adderar vi tre äpplen och två apelsiner, sedan delar vi med fem."],
    "da": ["Først lægger vi tre æbler og to appelsiner sammen, derefter dividerer vi med fem."],
    "fi": ["Ensin lasketaan yhteen kolme omenaa ja kaksi appelsiinia, sitten jaetaan viidellä."],
    "pl": ["Najpierw dodajemy trzy jabłka i dwie pomarańcze, a potem dzielimy przez pięć."],
    "cs": ["Nejprve sečteme tři jablka a dva pomeranče a pak vydělíme pěti."],
    "hu": ["Először összeadunk három almát és két narancsot, majd elosztjuk öttel."],
    "ro": ["Mai întâi adunăm trei mere și două portocale, apoi împărțim la cinci."],
    "tr": ["Önce üç elma ile iki portakalı toplarız, sonra beşe böleriz."],
    "vi": ["Đầu tiên, chúng ta cộng ba quả táo và hai quả cam rồi chia cho năm."],
    "id": ["Pertama kita jumlahkan tiga apel dan dua jeruk, lalu kita bagi dengan lima."],
    "zh": [
        "首先，我们把三个苹果和两个橙子加起来，然后除以五。",
        "等等，让我重新检查一下：答案应该是十五。",
        "這個問題的答案是十五，讓我們再檢查一次。",
    ],
    "ja": [
        "まず、りんご三個とみかん二個を足して、五で割ります。",
        "待って、もう一度確認しましょう。結果、答えは十五です。",
        "コンピュータのプログラムを実行すると、計算結果が出ます。",
    ],
    "ko": [
        "먼저 사과 세 개와 오렌지 두 개를 더한 다음 다섯으로 나눕니다.",
        "잠깐, 다시 확인해 봅시다. 답은 열다섯입니다.",
    ],
    "ru": ["Сначала сложим три яблока и два апельсина, затем разделим на пять."],
    "uk": ["Спочатку додамо три яблука і два апельсини, потім поділимо на п'ять."],
    "ar": ["أولا نجمع ثلاث تفاحات وبرتقالتين ثم نقسم على خمسة."],
    "hi": ["पहले हम तीन सेब और दो संतरे जोड़ते हैं, फिर पाँच से भाग देते हैं।"],
    "th": ["ก่อนอื่นเราบวกแอปเปิลสามลูกกับส้มสองลูกแล้วหารด้วยห้า"],
    "el": ["Πρώτα προσθέτουμε τρία μήλα και δύο πορτοκάλια και μετά διαιρούμε με το πέντε."],
    "he": ["קודם נחבר שלושה תפוחים ושני תפוזים ואז נחלק בחמש."],
}
PURE = [(text, code) for code, texts in SENTENCES.items() for text in texts]


@pytest.mark.parametrize(("text", "code"), PURE)
def test_a_sentence_is_in_its_own_language_and_in_no_other(text, code):
    assert consistency(text, code) >= 0.99
    others = {other: consistency(text, other) for other in SENTENCES if other != code}
    assert max(others.values()) <= 0.05, others


HALVES = [
    ("en", "zh"),
    ("en", "ko"),
    ("en", "de"),
    ("en", "ru"),
    ("fr", "es"),
    ("es", "pt"),
    ("de", "ja"),
    ("zh", "ja"),
    ("ko", "zh"),
    ("pl", "cs"),
]


@pytest.mark.parametrize(("first", "second"), HALVES)
def test_half_and_half_is_about_half(first, second):
    text = SENTENCES[first][0] + "\n" + SENTENCES[second][0]
    shares = consistency(text, first), consistency(text, second)
    assert min(shares) >= 0.3 and max(shares) <= 0.7, shares
    assert sum(shares) == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize("foreign", ["de", "fr", "zh", "ja", "ko", "ru"])
def test_more_of_the_target_is_more(foreign):
    shares = [
        consistency("\n".join(SENTENCES["en"][:2] * n + SENTENCES[foreign][:1] * 2), "en")
        for n in (0, 1, 2, 8)
    ]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] > 0.85
    assert len(set(shares)) == 4


@pytest.mark.parametrize(
    ("text", "target", "low", "high"),
    [
        # exact: Latin words are one each, two Chinese characters are one
        ("I think the answer is five. 我们认为答案是五个。", "en", 5 / 9.5, 5 / 9.5),
        ("我们 need to 计算 this value 然后 add 它们", "zh", 4 / 9, 4 / 9),
        ("我喜欢「ありがとう」这个词", "zh", 0.5, 0.6),
        ("我喜欢「ありがとう」这个词", "ja", 0.4, 0.5),
        # romanised text is not English
        ("wo renwei da'an shi shi wu, yinwei women xuyao xian jisuan", "en", 0, 0.1),
        ("dabun eun yeoldaseot imnida dasi hwaginhae bopsida", "en", 0, 0.1),
        ("asdkj qwelkj zxcmn qweoi zmxnc alskdj", "en", 0, 0.1),
        # names and loanwords beside the target
        ("Janet有5个苹果，她给了Tom两个，还剩几个？", "zh", 1, 1),
        ("在△ABC中，AB=AC，求sin A的值，长度为5cm。", "zh", 1, 1),
        ("Wir haben den Computer im Team gekauft, das war ein Highlight.", "de", 1, 1),
        ("The word Schadenfreude has no good translation into English.", "en", 1, 1),
        ("Janet Müller and Jürgen Schmidt went to Düsseldorf by train.", "en", 1, 1),
        # a known limit: foreign names that end a text go with their language
        ("Janet and Jürgen took the train from Düsseldorf to São Paulo.", "en", 0.8, 1),
        # but not instead of it
        ("Hello World", "zh", 0, 0),
        ("Danke schön, das war sehr freundlich", "en", 0, 0),
        ("東京都", "ja", 1, 1),
        ("Norwegen", "zh", 0, 0),
    ],
)
def test_mixtures(text, target, low, high):
    assert low - 1e-9 <= consistency(text, target) <= high + 1e-9


CODE = "```python\ndef addition(first, second):\n    return first + second\n```"
NO_WORDS = [
    CODE,
    "~~~\nprint the whole thing\n~~~",
    "```\nunclosed code runs to the end of the text",
    "`list comprehension here`",
    "$x^2 + y^2 = \\text{the square}$",
    "$$\\frac{distance}{time} = velocity$$",
    "\\[ \\text{number of apples} = 5 \\]",
    "\\( \\sin(alpha) \\)",
    "\\begin{align*} total &= first + second \\\\ &= 5 \\end{align*}",
    "https://example.com/some/english/words?and=more",
    "1,234.5 + 7e10 = 0x1F",
    "x_1 foo_bar number2 3rd",
    "a b c x y z",
    "sin cos km",
    "<reasoning> </answer> <|assistant|>",
    "∀ε>0 ∃δ>0: |x−a|<δ ⇒ |f(x)−L|<ε",
    "!!! ... ---",
    "🙂🙂",
]


@pytest.mark.parametrize("text", NO_WORDS)
def test_what_is_no_word_is_left_out(text):
    assert consistency(text, "zh") == consistency(text, "en") == 1
    for code in ("zh", "ko", "de"):
        assert consistency(SENTENCES[code][0] + "\n" + text, code) == 1


@pytest.mark.parametrize("target", ["en", "zh", "ja", "ko", "de"])
def test_blank_text_earns_nothing(target):
    blank = [
        "",
        " \n\t",
        "<think></think>",
        "<think>\n\n</think><answer>The answer is one</answer>",
    ]
    assert [consistency(text, target) for text in blank] == [0, 0, 0, 0]


def test_prices_are_not_formulas():
    assert prose("It costs $2 per egg and $18 in all.") == "It costs $2 per egg and $18 in all."
    text = "Die Eier kosten $2 pro Stück und die Äpfel kosten $18 im Laden."
    assert consistency(text, "en") == 0


def test_words_survive_a_formula_that_is_never_closed():
    for opening in ("\\[", "\\(", "$", "$$", "`", "\\begin{align}"):
        assert consistency(f"{opening} {SENTENCES['de'][0]}", "en") == 0, opening


def test_reasoning_of_a_whole_completion_is_judged():
    english, chinese = SENTENCES["en"][0], SENTENCES["zh"][0]
    completion = f"<think>{chinese}</think>\n<answer>{english}</answer>"
    assert consistency(completion, "zh") == 1
    assert consistency(completion, "en") == 0
    assert consistency(f"{chinese}</think>{english}", "zh") == 1


@pytest.mark.parametrize("target", ["zh-CN", "ZH", "zh_TW", " zh "])
def test_region_and_case_of_a_code_do_not_matter(target):
    assert consistency(SENTENCES["zh"][0], target) == 1


@pytest.mark.parametrize("target", ["", "xx", "english", "z h"])
def test_unknown_code_is_refused_with_the_known_ones(target):
    with pytest.raises(UserError, match=r"unknown language '.*': name one of ar, bg, bn, .*, zh$"):
        consistency("text", target)


@given(st.text(max_size=200), st.sampled_from(LANGUAGES))
def test_any_text_gives_a_share(text, target):
    share = consistency(text, target)
    assert isinstance(share, float) and 0 <= share <= 1
    assert consistency(text, target) == share


@given(st.lists(st.sampled_from(["```", "$", "$$", "`", r"\[", r"\]", r"\(", "<", "的", "the "])))
def test_any_markup_gives_a_share(pieces):
    assert 0 <= consistency("".join(pieces), "en") <= 1


ATTACKS = {
    "one word": "a" * 1_000_000,
    "dollars": "$a " * 200_000,
    "openings": r"\[" * 300_000,
    "environments": r"\begin{align}" * 50_000,
    "backticks": "` a" * 150_000,
    "brackets": "<a" * 300_000,
    "mail": "a." * 300_000,
    "digits": ("a" * 1000 + "1") * 500,
    "marks": "a" + "\u0301\u0327" * 250_000,
    "Armenian": "Աa" * 200_000,
    "characters": "我" * 500_000,
    "think": "<think>" * 100_000,
}


@pytest.mark.parametrize("name", ATTACKS)
def test_time_is_linear_in_the_length(name):
    consistency("warm", "en")
    start = time.process_time()
    consistency(ATTACKS[name], "en")
    assert time.process_time() - start < 8  # quadratic time would take minutes


# 20 problems of GSM8K (MIT) and 20 of CMATH (CC BY 4.0), as published.
PROBLEMS = [
    json.loads(line)
    for line in (Path(__file__).parent / "files" / "languages.jsonl").read_text().splitlines()
]


@pytest.mark.parametrize(("code", "least"), [("en", 0.97), ("zh", 0.98)])
def test_published_problems_are_in_their_language(code, least):
    texts = [row["text"] for row in PROBLEMS if row["language"] == code]
    assert len(texts) == 20
    assert statistics.mean(consistency(text, code) for text in texts) >= least
    for other in {"en", "zh", "de", "fr", "es", "ja", "ko"} - {code}:
        assert statistics.mean(consistency(text, other) for text in texts) <= 0.01


def test_threads_agree():
    wrong = []

    def judge(text, code):
        if consistency(text, code) < 0.99:
            wrong.append(text)

    threads = [threading.Thread(target=judge, args=pair) for pair in PURE]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not wrong and not any(thread.is_alive() for thread in threads)
