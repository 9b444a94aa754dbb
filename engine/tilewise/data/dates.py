"""English -> Japanese dates, times and numbers: a grammar that writes as many pairs as asked for.

    source  "half past three in the afternoon"    ASCII, at most MAX_SOURCE characters
    target  "午後3時30分"                          Arabic digits, Western years, no zero padding

One phrase always has one translation, whatever the seed. Where English is ambiguous the phrase is
left out: "5/3/2019", "12:00 pm", or a bare "2019", which may be a year or a number.

The held-out split goes by the target alone: about one in twenty is never trained on, however it is
worded. A pattern with fewer than 1,000 targets (`closed`) is a list to know by heart rather than a
rule to find, so all of it is trained on and none of it is tested.

The file reads: what is drawn at random, the patterns, the split.
"""

import hashlib
from calendar import monthrange
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from random import Random
from typing import NamedTuple

from tilewise.data.date_words import (
    AROUND_WEEKDAY,
    COMPOUND_UNITS,
    CURRENCIES,
    DAY_STYLES,
    MONTHS,
    ONES,
    PARTS_OF_CENTURY,
    PARTS_OF_DECADE,
    PARTS_OF_MONTH,
    PEOPLE,
    PERIODS_OF_YEAR,
    RELATIVE_DAYS,
    TENS,
    THIRDS_OF_MONTH,
    UNITS,
    WEEKDAYS,
    japanese_date,
    japanese_number,
    japanese_time,
    number_words,
    ordinal_digits,
    ordinal_words,
    plural,
    say_count,
    say_day,
    say_decimal,
    say_number,
    say_quantity,
    say_time,
    say_year,
    with_article,
    write_day,
)
from tilewise.errors import ArgumentError

MAX_SOURCE = 72
FIRST_YEAR, LAST_YEAR = 1800, 2099

Phrase = tuple[str, str]
"""English, Japanese."""

RANGES = (("from", "to", "まで"), ("between", "and", "の間"))


# --- What is drawn at random --------------------------------------------------------------------


def _of_size(rng: Random, digits: int) -> int:
    """A number of 1 to `digits` digits, all lengths alike, one in five of them round."""
    length = rng.randint(1, digits)
    number = rng.randrange(10 ** (length - 1) if length > 1 else 0, 10**length)
    unit = 10 ** rng.randrange(length) if rng.random() < 0.2 else 1
    return number // unit * unit


def _millions(rng: Random) -> int:
    """1,000,000 to 999,900,000 in whole hundreds of thousands, half of them in whole millions."""
    tenths = rng.randrange(10, 10 ** rng.randint(2, 4))
    return (tenths // 10 * 10 if rng.random() < 0.5 else tenths) * 10**5


def _some_minute(rng: Random) -> int:
    """Any minute, but full hours and multiples of five come up as often as people say them."""
    roll = rng.random()
    return 0 if roll < 0.25 else rng.randrange(0, 60, 5) if roll < 0.5 else rng.randrange(60)


def _some_time_of_day(rng: Random) -> Phrase:
    return _at(rng, rng.randint(1, 23), _some_minute(rng))


def _at(rng: Random, hour: int, minute: int) -> Phrase:
    return say_time(rng, hour, minute), japanese_time(hour, minute)


def _some_date(rng: Random) -> date:
    first, last = date(FIRST_YEAR, 1, 1), date(LAST_YEAR, 12, 31)
    return date.fromordinal(rng.randint(first.toordinal(), last.toordinal()))


def _some_year(rng: Random) -> int:
    return rng.randint(FIRST_YEAR, LAST_YEAR)


def _some_month_and_day(rng: Random) -> tuple[int, int]:
    leap_day = date.fromordinal(date(2000, 1, 1).toordinal() + rng.randrange(366))
    return leap_day.month, leap_day.day


def _some_month(rng: Random) -> Phrase:
    month = rng.randint(1, 12)
    return MONTHS[month - 1], f"{month}月"


def _some_weekday(rng: Random) -> Phrase:
    return _entry(rng, WEEKDAYS)


def _entry(rng: Random, table: dict[str, str]) -> Phrase:
    return rng.choice(list(table.items()))


def _range(rng: Random, first: Phrase, last: Phrase) -> Phrase:
    before, between, suffix = rng.choice(RANGES)
    return f"{before} {first[0]} {between} {last[0]}", f"{first[1]}から{last[1]}{suffix}"


# --- The patterns -------------------------------------------------------------------------------


def _full_date(rng: Random) -> Phrase:
    """ "the seventeenth of March, 2019" """
    day = _some_date(rng)
    target = japanese_date(day.month, day.day, day.year)
    if rng.random() < 0.1:
        return day.isoformat(), target
    comma = rng.choice((", ", " "))
    return say_day(rng, day.month, day.day) + comma + say_year(rng, day.year), target


def _weekday_full_date(rng: Random) -> Phrase:
    """ "Tuesday, June 5th, 2018", always a weekday that was."""
    day = _some_date(rng)
    weekday = list(WEEKDAYS)[day.weekday()]
    source = f"{weekday}, {say_day(rng, day.month, day.day)}{rng.choice((', ', ' '))}{day.year}"
    return source, japanese_date(day.month, day.day, day.year, weekday)


def _month_day(rng: Random) -> Phrase:
    """ "the third of May" """
    month, day = _some_month_and_day(rng)
    return say_day(rng, month, day), japanese_date(month, day)


def _weekday_month_day(rng: Random) -> Phrase:
    """ "Friday, May 3rd" """
    month, day = _some_month_and_day(rng)
    weekday, _ = _some_weekday(rng)
    comma = rng.choice((", ", " "))
    return weekday + comma + say_day(rng, month, day), japanese_date(month, day, weekday=weekday)


def _month_year(rng: Random) -> Phrase:
    """ "March 2019" """
    (month, target), year = _some_month(rng), _some_year(rng)
    return month + rng.choice((" ", " of ", ", ")) + say_year(rng, year), f"{year}年{target}"


def _year_alone(rng: Random) -> Phrase:
    """ "the year 1987", "AD 1987" """
    year = rng.randint(1000, LAST_YEAR)
    if rng.random() < 0.2:
        return rng.choice((f"AD {year}", f"{year} AD", f"{year} CE")), f"西暦{year}年"
    return rng.choice(("the year ", "year ")) + say_year(rng, year), f"{year}年"


def _year_before_christ(rng: Random) -> Phrase:
    """ "44 BC" """
    year = rng.randint(1, 1999)
    return f"{rng.choice(('', 'the year '))}{year} {rng.choice(('BC', 'BCE'))}", f"紀元前{year}年"


def _period_of_year(rng: Random) -> Phrase:
    """ "the summer of 1969", "early March 2019" """
    year = _some_year(rng)
    if rng.random() < 0.5:
        source, target = _entry(rng, PERIODS_OF_YEAR)
        return f"{rng.choice(('the ', ''))}{source} {say_year(rng, year)}", f"{year}年{target}"
    source, target = _third_of_month(rng)
    return f"{source}{rng.choice((' ', ' of '))}{year}", f"{year}年{target}"


def _third_of_month(rng: Random) -> Phrase:
    (when, third), (month, target) = _entry(rng, THIRDS_OF_MONTH), _some_month(rng)
    return when + month, target + third


def _part_of_month(rng: Random) -> Phrase:
    """ "late May", "the end of May", "the second week of May", "the first Monday in May" """
    style = rng.randrange(4)
    if style == 0:
        return _third_of_month(rng)
    month, target = _some_month(rng)
    if style == 1:
        when, part = _entry(rng, PARTS_OF_MONTH)
        return f"the {when} of {month}", target + part
    number = rng.randint(1, 6)
    which, nth = (ordinal_words(number), f"第{number}") if number < 6 else ("last", "最終")
    what, unit = ("week", "週") if style == 2 else _some_weekday(rng)
    return f"the {which} {what} {rng.choice(('of', 'in'))} {month}", f"{target}の{nth}{unit}"


def _decade(rng: Random) -> Phrase:
    """ "the late 1980s", "the nineteen eighties", "the nineties" """
    tens = rng.randint(2, 9)
    if rng.random() < 0.25:
        return f"the {TENS[tens][:-1]}ies", f"{tens}0年代"
    century = rng.randint(17, 20)
    words = f"{number_words(century)} {TENS[tens][:-1]}ies"
    source = rng.choice((f"{century}{tens}0s", words))
    when, part = _entry(rng, PARTS_OF_DECADE)
    return f"the {when}{source}", f"{century}{tens}0年代{part}"


def _century(rng: Random) -> Phrase:
    """ "the late nineteenth century", "the 5th century BC" """
    number = rng.randint(1, 21)
    when, part = _entry(rng, PARTS_OF_CENTURY)
    era, before = rng.choice((("", ""), (" BC", "紀元前"))) if number <= 10 else ("", "")
    nth = rng.choice((ordinal_words, ordinal_digits))(number)
    return f"the {when}{nth} century{era}", f"{before}{number}世紀{part}"


def _clock_time(rng: Random) -> Phrase:
    """ "half past three in the afternoon", "3:45 pm"; noon and midnight are in `relative`."""
    hour, minute = rng.randrange(24), _some_minute(rng)
    if hour % 12 == 0 and minute == 0:
        minute = rng.randint(1, 59)
    return _at(rng, hour, minute)


def _clock_24_hours(rng: Random) -> Phrase:
    """ "15:45" """
    hour, minute = rng.randrange(24), _some_minute(rng)
    source = f"{hour:0{rng.randint(1, 2)}d}:{minute:02d}"
    return source, f"{hour}時" + (f"{minute}分" if minute else "")


def _weekday(rng: Random) -> Phrase:
    """ "next Monday", "from Monday to Friday" """
    if rng.random() < 0.2:
        return _range(rng, *rng.sample(list(WEEKDAYS.items()), 2))
    english, japanese = _some_weekday(rng)
    source, target = _entry(rng, AROUND_WEEKDAY)
    return source.format(english), target.format(japanese)


def _relative(rng: Random) -> Phrase:
    """ "the day after tomorrow" """
    return _entry(rng, RELATIVE_DAYS)


def _from_now(rng: Random) -> Phrase:
    """ "three days ago", "in two weeks" """
    number = rng.choice((rng.randint(1, 12), rng.randint(1, 100)))
    noun, unit, _ = rng.choice(UNITS)
    style, side = rng.choice((("{} ago", "前"), ("in {}", "後"), ("{} from now", "後")))
    return style.format(say_quantity(rng, number, noun)), f"{number}{unit}{side}"


def _duration(rng: Random) -> Phrase:
    """ "twenty minutes", "an hour and a half" """
    if rng.random() < 0.08:
        return _half_hours(rng)
    number = rng.choice((rng.randint(1, 20), rng.randint(1, 200)))
    noun, _, unit = rng.choice(UNITS)
    return say_quantity(rng, number, noun), f"{number}{unit}"


def _half_hours(rng: Random) -> Phrase:
    hours = rng.randint(0, 12)
    if hours == 0:
        return "half an hour", "30分"
    half = "an hour and a half" if hours == 1 else f"{ONES[hours]} and a half hours"
    return half, f"{hours}時間30分"


def _compound_duration(rng: Random) -> Phrase:
    """ "three hours and twenty minutes" """
    large, large_unit, most, small, small_unit, fewest, joiner = rng.choice(COMPOUND_UNITS)
    first, second = rng.randint(1, most), rng.randint(1, fewest)
    link = rng.choice((" and ", " and ", ", ", " "))
    source = say_quantity(rng, first, large) + link + say_quantity(rng, second, small)
    return source, f"{first}{large_unit}{joiner}{second}{small_unit}"


def _frequency(rng: Random) -> Phrase:
    """ "every three days", "twice a week" """
    noun, unit, _ = rng.choice(UNITS)
    if rng.random() < 0.5:
        number = rng.randint(2, 30)
        return f"every {say_count(rng, number)} {noun}s", f"{number}{unit}ごと"
    number = rng.choice((1, 2, rng.randint(3, 20)))
    times = {1: "once", 2: "twice"}.get(number) or f"{say_count(rng, number)} times"
    return f"{times} {with_article(noun)}", f"1{unit}に{number}回"


def _date_range(rng: Random) -> Phrase:
    """ "from the third to the ninth of May", "from May 28th to June 2nd" """
    month, day = _some_month_and_day(rng)
    if rng.random() < 0.4:
        last_month, last_day = _some_month_and_day(rng)
    else:
        last_month, last_day = month, rng.randint(1, monthrange(2000, month)[1])
    if month == last_month and day >= last_day:
        return _date_range(rng)
    last = f"{last_day}日" if month == last_month else japanese_date(last_month, last_day)
    first, end = _range_in_words(rng, (month, day), (last_month, last_day))
    return _range(rng, (first, japanese_date(month, day)), (end, last))


def _range_in_words(rng: Random, first: tuple[int, int], last: tuple[int, int]) -> tuple[str, str]:
    style = rng.choice(DAY_STYLES)
    start, end = write_day(style, *first), write_day(style, *last)
    if first[0] == last[0] and rng.random() < 0.6:
        return _say_month_once(style, start, end)
    return start, end


def _say_month_once(style: str, start: str, end: str) -> tuple[str, str]:
    """ "the third of May", "the ninth of May" -> "the third", "the ninth of May"."""
    if style.startswith(("{month}", "{abbreviation}")):
        return start, end.split(" ", 1)[1]
    return start.rsplit(" of " if " of " in style else " ", 1)[0], end


def _time_range(rng: Random) -> Phrase:
    """ "between 2 pm and 4 pm" """
    quarters = range(4, 24 * 4, rng.choice((1, 4)))
    first, last = sorted(rng.sample(quarters, 2))
    return _range(rng, _at(rng, *divmod(first * 15, 60)), _at(rng, *divmod(last * 15, 60)))


def _year_range(rng: Random) -> Phrase:
    """ "from 1914 to 1918" """
    first = rng.randint(FIRST_YEAR, LAST_YEAR - 1)
    last = rng.randint(first + 1, min(first + 60, LAST_YEAR))
    return _range(rng, (str(first), f"{first}年"), (str(last), f"{last}年"))


def _date_and_time(rng: Random) -> Phrase:
    """ "3:45 pm on March 17th" """
    month, day = _some_month_and_day(rng)
    when, target = _some_time_of_day(rng)
    return _join_time(rng, when, say_day(rng, month, day)), japanese_date(month, day) + target


def _day_and_time(rng: Random) -> Phrase:
    """ "Tuesday at half past three in the afternoon", "tomorrow at noon" """
    when, time = _some_time_of_day(rng)
    if rng.random() < 0.2:
        source = rng.choice(("today", "tomorrow", "yesterday"))
        return f"{source} at {when}", f"{RELATIVE_DAYS[source]}の{time}"
    source, target = _some_weekday(rng)
    return _join_time(rng, when, source), f"{target}の{time}"


def _join_time(rng: Random, time: str, day: str) -> str:
    return rng.choice((f"{time} on {day}", f"{day} at {time}"))


def _number(rng: Random) -> Phrase:
    """ "two hundred and six" """
    number = _of_size(rng, 6)
    return say_number(rng, number), japanese_number(number)


def _large_number(rng: Random) -> Phrase:
    """ "three million four hundred thousand" """
    number = _millions(rng)
    return say_number(rng, number), japanese_number(number)


def _ordinal(rng: Random) -> Phrase:
    """ "the twenty-third" """
    number = rng.randint(1, 10 ** rng.randint(1, 3) * 2)
    nth = ordinal_digits(number) if rng.random() < 0.35 else ordinal_words(number)
    return rng.choice(("the ", "the ", "")) + nth, f"{number}番目"


def _decimal_number(rng: Random) -> Phrase:
    """ "three point one four" """
    places = rng.randint(1, 3)
    fraction = f"{rng.randrange(10 ** (places - 1)):0{places}d}"[1:] + str(rng.randint(1, 9))
    text = f"{_of_size(rng, 3)}.{fraction}"
    return say_decimal(rng, text), text


def _fraction(rng: Random) -> Phrase:
    """ "three quarters" """
    bottom = rng.choice((rng.randint(2, 12), rng.randint(2, 50)))
    top = rng.randint(1, bottom - 1)
    name = {2: "half", 4: "quarter"}.get(bottom) or ordinal_words(bottom)
    source = f"{number_words(top)} {plural(top, name)}"
    if top == 1 and rng.random() < 0.5:
        source = with_article(name)
    return source, f"{bottom}分の{top}"


def _percentage(rng: Random) -> Phrase:
    """ "twelve point five percent" """
    text = _tenths(rng, 1, 2000)
    sign = rng.choice((" percent", " per cent", "%"))
    return (f"{text}%" if sign == "%" else say_decimal(rng, text) + sign), f"{text}%"


def _tenths(rng: Random, low: int, high: int) -> str:
    """A number from low/10 to high/10, half of the time a whole one: "7", "7.5"."""
    whole, tenth = divmod(rng.randint(low, high), 10)
    return f"{whole}.{tenth}" if tenth and (whole == 0 or rng.random() < 0.5) else f"{whole}"


def _money(rng: Random) -> Phrase:
    """ "five dollars and fifty cents", "two million yen" """
    noun, currency, cent, hundredth = rng.choice(CURRENCIES)
    if cent and rng.random() < 0.4:
        return _money_with_cents(rng, noun, currency, cent, hundredth)
    number = _millions(rng) if rng.random() < 0.15 else _of_size(rng, 5) or 1
    target = f"{japanese_number(number)}{currency}"
    if rng.random() < 0.3 and number < 10**6:
        digits = f"{number:,}"
        return f"${digits}" if noun == "dollar" else f"{digits} {plural(number, noun)}", target
    return f"{say_number(rng, number)} {plural(number, noun)}", target


def _money_with_cents(rng: Random, noun: str, currency: str, cent: str, hundredth: str) -> Phrase:
    whole, part = rng.randint(1, 10 ** rng.randint(1, 3)), rng.randint(1, 99)
    target = f"{whole}{currency}{part}{hundredth}"
    if noun == "dollar" and rng.random() < 0.4:
        return f"${whole}.{part:02d}", target
    large, small = say_count(rng, whole), say_count(rng, part)
    return f"{large} {plural(whole, noun)} and {small} {plural(part, cent)}", target


def _temperature(rng: Random) -> Phrase:
    """ "minus five degrees Celsius" """
    text = _tenths(rng, 0, 1200)
    noun = "degree" if text == "1" else "degrees"
    scale, prefix = rng.choice((("", ""), (" Celsius", "摂氏"), (" Fahrenheit", "華氏")))
    minus, sign = ("minus ", "マイナス") if rng.random() < 0.25 and text != "0" else ("", "")
    return f"{minus}{say_decimal(rng, text)} {noun}{scale}", f"{prefix}{sign}{text}度"


def _age(rng: Random) -> Phrase:
    """ "thirty-two years old", "a 7-year-old girl" """
    age = rng.randint(1, 110)
    count = rng.choice((str(age), number_words(age)))
    if rng.random() < 0.5:
        years = plural(age, "year")
        styles = (f"{count} {years} old", f"{count} {years} of age", f"aged {count}")
        return rng.choice(styles), f"{age}歳"
    noun, person = rng.choice(list(PEOPLE.items())[:2] if age >= 18 else list(PEOPLE.items())[2:])
    return with_article(f"{count.replace(' ', '-')}-year-old {noun}"), f"{age}歳の{person}"


class Pattern(NamedTuple):
    """How to draw one phrase, how often, and whether there are too few targets to test."""

    draw: Callable[[Random], Phrase]
    weight: int
    closed: bool = False


PATTERNS: dict[str, Pattern] = {
    "full_date": Pattern(_full_date, 4),
    "weekday_full_date": Pattern(_weekday_full_date, 3),
    "month_day": Pattern(_month_day, 2, closed=True),
    "weekday_month_day": Pattern(_weekday_month_day, 2),
    "month_year": Pattern(_month_year, 2),
    "year": Pattern(_year_alone, 2),
    "year_bc": Pattern(_year_before_christ, 1),
    "period_of_year": Pattern(_period_of_year, 2),
    "part_of_month": Pattern(_part_of_month, 2, closed=True),
    "decade": Pattern(_decade, 1, closed=True),
    "century": Pattern(_century, 1, closed=True),
    "clock_time": Pattern(_clock_time, 4),
    "clock_24_hours": Pattern(_clock_24_hours, 1),
    "weekday": Pattern(_weekday, 1, closed=True),
    "relative": Pattern(_relative, 1, closed=True),
    "from_now": Pattern(_from_now, 2),
    "duration": Pattern(_duration, 2),
    "compound_duration": Pattern(_compound_duration, 2),
    "frequency": Pattern(_frequency, 1, closed=True),
    "date_range": Pattern(_date_range, 3),
    "time_range": Pattern(_time_range, 3),
    "year_range": Pattern(_year_range, 1),
    "date_and_time": Pattern(_date_and_time, 3),
    "day_and_time": Pattern(_day_and_time, 2),
    "number": Pattern(_number, 4),
    "large_number": Pattern(_large_number, 2),
    "ordinal": Pattern(_ordinal, 2),
    "decimal": Pattern(_decimal_number, 2),
    "fraction": Pattern(_fraction, 2),
    "percentage": Pattern(_percentage, 2),
    "money": Pattern(_money, 3),
    "temperature": Pattern(_temperature, 2),
    "age": Pattern(_age, 1, closed=True),
}


# --- Sampling and the split ---------------------------------------------------------------------


class Example(NamedTuple):
    """An English phrase, its Japanese translation, and the name in PATTERNS it was drawn from."""

    source: str
    target: str
    pattern: str


def sample_pair(rng: Random, patterns: Sequence[str] = tuple(PATTERNS)) -> Example:
    """Draw one pair from the whole grammar, or from some of its patterns, by weight."""
    weights = [PATTERNS[name].weight for name in patterns]
    name = rng.choices(patterns, weights)[0]
    source, target = PATTERNS[name].draw(rng)
    while len(source) >= MAX_SOURCE:  # Leaves room for the full stop.
        source, target = PATTERNS[name].draw(rng)
    return Example(_as_typed(rng, source), target, name)


def _as_typed(rng: Random, source: str) -> str:
    """As people type: a capital first letter, all lower case, a full stop, mostly neither."""
    roll = rng.random()
    if roll < 0.25:
        source = source[0].upper() + source[1:]
    elif roll < 0.35:
        source = source.lower()
    return f"{source}." if rng.random() < 0.15 and not source.endswith(".") else source


def is_held_out(example: Example) -> bool:
    """Whether training must not see this target: about one in twenty, the same ones for ever."""
    digest = hashlib.sha256(example.target.encode()).digest()
    return not PATTERNS[example.pattern].closed and int.from_bytes(digest[:4]) % 20 == 0


def training_pairs(seed: int) -> Iterator[Example]:
    """Endless pairs to train on, every pattern among them. A seed gives the same pairs anywhere."""
    rng = Random(seed)
    while True:
        example = sample_pair(rng)
        if not is_held_out(example):
            yield example


def held_out_pairs(count: int, seed: int) -> list[Example]:
    """`count` pairs with distinct sources, whose targets no training seed ever yields.

    Raises ArgumentError for a count out of 0 to 10,000: beyond, the smaller patterns run dry.
    """
    if not 0 <= count <= 10_000:
        raise ArgumentError(f"count is {count}; give one from 0 to 10000")
    rng = Random(seed)
    found: dict[str, Example] = {}
    while len(found) < count:
        example = sample_pair(rng)
        if is_held_out(example):
            found.setdefault(example.source, example)
    return list(found.values())
