"""Writes the training corpus of the embedded model `tiny`: seeded, deterministic chat conversations.

Used by `ci/train_tiny.py` (training and scoring) and by tests. It needs no tensor library. What it offers:

    conversations()       the fixed corpus
    epoch()               one round of training: the facts of it, and freshly drawn conversations of the same kinds
    held_out()            conversations of the same kind that training never sees
    trained_questions()   (messages, tools, exact answer): what a greedy decoder must answer word for word
    render()              a conversation as text, by the same chat template that the tokenizer files carry

Run as a program it writes `recipes/models/tiny/heldout.txt`.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

Message = dict[str, Any]
Tool = dict[str, Any]

SEED = 2024
HELD_OUT_FILE = Path(__file__).resolve().parent.parent / "recipes" / "models" / "tiny" / "heldout.txt"

# The prompt text of tools is the one of Hermes and Qwen 2.5, so the tool-call format `hermes` serves tiny as well.
CHAT_TEMPLATE = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments ' }}
    {{- 'within <tool_call></tool_call> XML tags:\n<tool_call>\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first and tools %}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {%- if message.content %}
            {{- message.content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function %}
                {%- set call = call.function %}
            {%- endif %}
            {%- if not loop.first or message.content %}
                {{- '\n' }}
            {%- endif %}
            {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {%- if call.arguments is string %}
                {{- call.arguments }}
            {%- else %}
                {{- call.arguments | tojson }}
            {%- endif %}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".strip()


@dataclass(frozen=True)
class Conversation:
    """A chat that ends with an assistant message; `kind` says which part of the corpus it belongs to."""

    kind: str
    messages: list[Message]
    tools: list[Tool] | None = None


@dataclass(frozen=True)
class Question:
    """A prompt and the one answer that greedy decoding must give."""

    kind: str
    messages: list[Message]
    answer: str
    tools: list[Tool] | None = None


# --- facts -----------------------------------------------------------------------------------------------------------
# Tables first: a question, an answer, and `key value` pairs that fill both. Regular facts are cheap for a small model.

TABLES: list[tuple[str, str, str]] = [
    (
        "What is the capital of {}?",
        "The capital of {} is {}.",
        "France=Paris, Germany=Berlin, Italy=Rome, Spain=Madrid, Portugal=Lisbon, Austria=Vienna, Greece=Athens, "
        "Poland=Warsaw, Hungary=Budapest, Norway=Oslo, Sweden=Stockholm, Finland=Helsinki, Denmark=Copenhagen, "
        "Ireland=Dublin, Iceland=Reykjavik, Belgium=Brussels, Turkey=Ankara, Egypt=Cairo, Kenya=Nairobi, Japan=Tokyo, "
        "China=Beijing, India=New Delhi, Thailand=Bangkok, Vietnam=Hanoi, Australia=Canberra, New Zealand=Wellington, "
        "Canada=Ottawa, Mexico=Mexico City, Cuba=Havana, Peru=Lima, Chile=Santiago, Argentina=Buenos Aires, "
        "Brazil=Brasilia, Colombia=Bogota, Romania=Bucharest, Bulgaria=Sofia, Croatia=Zagreb, Morocco=Rabat, "
        "Estonia=Tallinn, Latvia=Riga",
    ),
    (
        "What is the chemical symbol of {}?",
        "The chemical symbol of {} is {}.",
        "hydrogen=H, helium=He, carbon=C, nitrogen=N, oxygen=O, sodium=Na, iron=Fe, copper=Cu, silver=Ag, gold=Au, "
        "lead=Pb, tin=Sn, zinc=Zn, calcium=Ca, potassium=K, chlorine=Cl, neon=Ne, mercury=Hg, magnesium=Mg, nickel=Ni",
    ),
    (
        "What is a young {} called?",
        "A young {} is called a {}.",
        "dog=puppy, cat=kitten, cow=calf, sheep=lamb, goat=kid, horse=foal, bear=cub, hen=chick, duck=duckling, "
        "goose=gosling, frog=tadpole, swan=cygnet, deer=fawn, pig=piglet, kangaroo=joey",
    ),
    (
        "What is the opposite of {}?",
        "The opposite of {} is {}.",
        "hot=cold, big=small, up=down, day=night, fast=slow, hard=soft, empty=full, early=late, open=closed, wet=dry, "
        "left=right, loud=quiet, rich=poor, happy=sad, thick=thin, strong=weak, high=low, true=false, begin=end, "
        "north=south, east=west, near=far",
    ),
    (
        "How many sides does a {} have?",
        "A {} has {} sides.",
        "triangle=three, square=four, pentagon=five, hexagon=six, heptagon=seven, octagon=eight, nonagon=nine, "
        "decagon=ten",
    ),
    (
        "How many legs does a {} have?",
        "A {} has {} legs.",
        "dog=four, spider=eight, bee=six, bird=two, crab=ten, horse=four, beetle=six",
    ),
    (
        "Which month comes after {}?",
        "After {} comes {}.",
        "January=February, February=March, March=April, April=May, May=June, June=July, July=August, "
        "August=September, September=October, October=November, November=December, December=January",
    ),
    (
        "Which day comes after {}?",
        "After {} comes {}.",
        "Monday=Tuesday, Tuesday=Wednesday, Wednesday=Thursday, Thursday=Friday, Friday=Saturday, Saturday=Sunday, "
        "Sunday=Monday",
    ),
    (
        "How do you say {} in French?",
        "In French, {} is {}.",
        "hello=bonjour, thank you=merci, cat=chat, dog=chien, water=eau, bread=pain, yes=oui, house=maison, "
        "book=livre, milk=lait, school=école, summer=été, forest=forêt, boy=garçon",
    ),
    (
        "How do you say {} in Spanish?",
        "In Spanish, {} is {}.",
        "hello=hola, thank you=gracias, cat=gato, dog=perro, water=agua, bread=pan, sun=sol, moon=luna, house=casa, "
        "book=libro, tomorrow=mañana, child=niño",
    ),
    (
        "How do you say {} in German?",
        "In German, {} is {}.",
        "hello=hallo, thank you=danke, cat=Katze, dog=Hund, water=Wasser, bread=Brot, book=Buch, door=Tür, "
        "beautiful=schön",
    ),
    (
        "Which continent is {} in?",
        "{} is in {}.",
        "Egypt=Africa, Japan=Asia, Brazil=South America, Canada=North America, France=Europe, Kenya=Africa, "
        "India=Asia, Peru=South America, Poland=Europe, Mexico=North America, Morocco=Africa, China=Asia, "
        "Chile=South America, Norway=Europe, Vietnam=Asia, Ghana=Africa",
    ),
    (
        "What sound does a {} make?",
        "A {} says {}.",
        "cow=moo, cat=meow, dog=woof, duck=quack, sheep=baa, pig=oink, hen=cluck",
    ),
    (
        "Where does a {} live?",
        "A {} lives in a {}.",
        "bee=hive, bird=nest, rabbit=burrow, beaver=lodge, bear=den, spider=web",
    ),
    (
        "Who wrote {}?",
        "{} was written by {}.",
        "Hamlet=William Shakespeare, Don Quixote=Miguel de Cervantes, War and Peace=Leo Tolstoy, "
        "Pride and Prejudice=Jane Austen, Faust=Johann Wolfgang von Goethe, Oliver Twist=Charles Dickens, "
        "Frankenstein=Mary Shelley, Moby-Dick=Herman Melville, The Hobbit=J. R. R. Tolkien, "
        "Treasure Island=Robert Louis Stevenson, Les Misérables=Victor Hugo, Jane Eyre=Charlotte Brontë",
    ),
    (
        "Show me a {} emoji.",
        "Here is a {} emoji: {}",
        "cat=🐱, dog=🐶, fox=🦊, heart=❤️, star=⭐, rocket=🚀, tree=🌳, fish=🐟, party=🎉, smiling=😊",
    ),
]

FACTS = """
What is the largest planet in our solar system? | The largest planet is Jupiter.
What is the smallest planet in our solar system? | The smallest planet is Mercury.
Which planet is closest to the Sun? | Mercury is closest to the Sun.
Which planet is known as the red planet? | Mars is known as the red planet.
How many planets are in our solar system? | There are eight planets in our solar system.
Which planet has the brightest rings? | Saturn has the brightest rings.
What does the Earth go around? | The Earth goes around the Sun.
What does the Moon go around? | The Moon goes around the Earth.
What is the Sun? | The Sun is a star.
Who was the first person on the Moon? | Neil Armstrong was the first person on the Moon.
Who was the first person in space? | Yuri Gagarin was the first person in space.
How long does the Earth take to go around the Sun? | It takes about 365 days.
How many days are in a week? | There are seven days in a week.
How many months are in a year? | There are twelve months in a year.
How many hours are in a day? | There are 24 hours in a day.
How many minutes are in an hour? | There are 60 minutes in an hour.
How many seconds are in a minute? | There are 60 seconds in a minute.
How many days are in a leap year? | There are 366 days in a leap year.
How many years are in a century? | There are 100 years in a century.
How many years are in a decade? | There are ten years in a decade.
Which month is the shortest? | February is the shortest month.
How many letters are in the English alphabet? | There are 26 letters in the English alphabet.
What is the first letter of the alphabet? | The first letter is A.
What is the last letter of the alphabet? | The last letter is Z.
Which letters are the vowels? | The vowels are A, E, I, O and U.
How many grams are in a kilogram? | There are 1000 grams in a kilogram.
How many metres are in a kilometre? | There are 1000 metres in a kilometre.
How many centimetres are in a metre? | There are 100 centimetres in a metre.
How many items are in a dozen? | There are twelve items in a dozen.
At what temperature does water freeze? | Water freezes at 0 degrees Celsius.
At what temperature does water boil? | Water boils at 100 degrees Celsius.
What is water made of? | Water is made of hydrogen and oxygen.
What is the formula of water? | The formula of water is H2O.
What is the formula of table salt? | The formula of table salt is NaCl.
What gas do plants take in? | Plants take in carbon dioxide.
What gas do we need to breathe? | We need oxygen to breathe.
What is ice? | Ice is frozen water.
What is steam? | Steam is water as a gas.
What is the hardest natural material? | Diamond is the hardest natural material.
Which metal is liquid at room temperature? | Mercury is liquid at room temperature.
What is the lightest element? | Hydrogen is the lightest element.
What is the largest ocean? | The Pacific is the largest ocean.
What is the largest animal? | The blue whale is the largest animal.
What is the tallest animal? | The giraffe is the tallest animal.
What is the fastest land animal? | The cheetah is the fastest land animal.
What is the largest bird? | The ostrich is the largest bird.
Is a whale a fish? | No, a whale is a mammal.
Is a bat a bird? | No, a bat is a mammal.
Is a spider an insect? | No, a spider is an arachnid.
Can a penguin fly? | No, a penguin cannot fly, but it swims well.
What do pandas eat? | Pandas eat bamboo.
What do bees make? | Bees make honey.
What do cows give us? | Cows give us milk.
What does a caterpillar become? | A caterpillar becomes a butterfly.
How many arms does an octopus have? | An octopus has eight arms.
How many legs does an insect have? | An insect has six legs.
What is the highest mountain in the world? | Mount Everest is the highest mountain.
What is the largest country by area? | Russia is the largest country by area.
What is the smallest country in the world? | Vatican City is the smallest country.
What is the largest desert with hot sand? | The Sahara is the largest hot desert.
How many continents are there? | There are seven continents.
What is the largest continent? | Asia is the largest continent.
What is the smallest continent? | Australia is the smallest continent.
Which river flows through Paris? | The Seine flows through Paris.
Which river flows through London? | The Thames flows through London.
Which river flows through Vienna? | The Danube flows through Vienna.
Which river flows through Cairo? | The Nile flows through Cairo.
Where is the Eiffel Tower? | The Eiffel Tower is in Paris.
Where is the Colosseum? | The Colosseum is in Rome.
Where is the Great Wall? | The Great Wall is in China.
Where is the Taj Mahal? | The Taj Mahal is in India.
Where are the pyramids of Giza? | The pyramids of Giza are in Egypt.
Where is Machu Picchu? | Machu Picchu is in Peru.
Where is Big Ben? | Big Ben is in London.
What is the currency of Japan? | The currency of Japan is the yen.
What is the currency of the United Kingdom? | The currency of the United Kingdom is the pound.
What is the currency of India? | The currency of India is the rupee.
What is the currency of Germany? | The currency of Germany is the euro.
Who painted the Mona Lisa? | Leonardo da Vinci painted the Mona Lisa.
Who painted The Starry Night? | Vincent van Gogh painted The Starry Night.
Who painted Guernica? | Pablo Picasso painted Guernica.
Who composed The Magic Flute? | Mozart composed The Magic Flute.
Who composed the Ninth Symphony with the Ode to Joy? | Beethoven composed it.
Who composed The Four Seasons? | Antonio Vivaldi composed The Four Seasons.
Who discovered penicillin? | Alexander Fleming discovered penicillin.
Who wrote about the theory of relativity? | Albert Einstein wrote about the theory of relativity.
Who described the law of gravity? | Isaac Newton described the law of gravity.
Who was Ada Lovelace? | Ada Lovelace wrote the first published computer program.
Who was Alan Turing? | Alan Turing was a founder of computer science.
Who was Marie Curie? | Marie Curie studied radioactivity and won two Nobel Prizes.
How many strings does a violin have? | A violin has four strings.
How many strings does a standard guitar have? | A standard guitar has six strings.
How many keys does a standard piano have? | A standard piano has 88 keys.
How many players does a football team have on the field? | A football team has eleven players.
How many squares are on a chess board? | There are 64 squares on a chess board.
Which chess piece is the most important? | The king is the most important piece.
How many cards are in a standard deck? | There are 52 cards in a standard deck.
What colour is the sky on a clear day? | The sky is blue.
What colour is grass? | Grass is green.
What colour is snow? | Snow is white.
What colour is a ripe banana? | A ripe banana is yellow.
What colour do red and yellow make? | Red and yellow make orange.
What colour do blue and yellow make? | Blue and yellow make green.
What colour do red and blue make? | Red and blue make purple.
How many colours does a rainbow have? | A rainbow has seven colours.
How many teeth does an adult usually have? | An adult usually has 32 teeth.
How many bones does an adult human have? | An adult human has 206 bones.
What does the heart do? | The heart pumps blood through the body.
What do we use to see? | We use our eyes to see.
What do we use to hear? | We use our ears to hear.
What is bread made from? | Bread is made from flour, water and yeast.
What is cheese made from? | Cheese is made from milk.
What is paper made from? | Paper is made from wood.
What is glass made from? | Glass is made from sand.
What is the square root of 81? | The square root of 81 is 9.
What is the square root of 144? | The square root of 144 is 12.
What is half of 100? | Half of 100 is 50.
What is the first prime number? | The first prime number is 2.
Is 7 a prime number? | Yes, 7 is a prime number.
Is 9 a prime number? | No, 9 is 3 times 3.
What is pi, roughly? | Pi is roughly 3.14159.
How many degrees are in a circle? | There are 360 degrees in a circle.
How many degrees are in a right angle? | There are 90 degrees in a right angle.
How many bits are in a byte? | There are 8 bits in a byte.
What does CPU mean? | CPU means central processing unit.
What does GPU mean? | GPU means graphics processing unit.
What does RAM mean? | RAM means random access memory.
What does JSON mean? | JSON means JavaScript Object Notation.
What does API mean? | API means application programming interface.
What does LLM mean? | LLM means large language model.
What does URL mean? | URL means uniform resource locator.
What is binary 1010 in decimal? | Binary 1010 is 10 in decimal.
What are the three primary colours of light? | They are red, green and blue.
What are the four seasons? | The four seasons are spring, summer, autumn and winter.
What are the cardinal directions? | They are north, east, south and west.
Name three fruits. | Apple, pear and cherry.
Name three animals. | Fox, owl and bear.
Name three colours. | Red, green and blue.
Name three planets. | Mars, Venus and Saturn.
"""

MLCBUILD_FACTS = """
What is mlcbuild? | mlcbuild is a declarative build graph that turns recipes into tested LLM packages.
What does mlcbuild do? | It builds LLM packages from recipes and runs them with an OpenAI-compatible server.
How do I build a model? | Run `doit build model=tiny`.
How do I build tiny for CUDA? | Run `doit build model=tiny target=cuda`.
How do I build for the CPU? | Run `doit build target=cpu`.
How do I serve a model? | Run `doit serve model=tiny`.
How do I chat with a model? | Run `doit chat model=tiny`.
How do I build the nightly matrix? | Run `doit build matrix=nightly`.
Which command starts the server? | `doit serve` starts the server.
Which command starts a chat? | `doit chat` starts a chat.
Which command builds a package? | `doit build` builds a package.
What is a recipe? | A recipe is one YAML file: a model, a quantization, a target or a matrix.
What is a variant? | A variant is one model, one quantization and one target.
What is a step? | A step is one file in `tasks/`, such as convert or compile.
What is an action? | An action is one execution of a step.
What is the key of an action? | It is the SHA-256 of everything that can change its outputs.
What is the store? | The store is content-addressed: it keeps action records and blobs.
What is a library in mlcbuild? | A library is the compiled model functions.
What is a package in mlcbuild? | A package is a library, weights, a tokenizer and a manifest.
What is the engine? | The engine loads a package and generates text.
What is the executor? | The executor is the part of the engine that calls TVM.
What is the scheduler? | The scheduler is the part of the engine that decides what runs.
What is a target? | A target is a YAML file that names the hardware to compile for.
What is a quantization recipe? | It names a method and its parameters.
What is a matrix in mlcbuild? | A matrix lists the variants to build.
Which quantizations are there? | There are q0f32, q0f16, q4f16_1 and q4f32_1.
What is q0f32? | q0f32 keeps the weights in 32-bit floats.
What is q0f16? | q0f16 keeps the weights in 16-bit floats.
What is q4f16_1? | q4f16_1 stores 4-bit weights in groups of 32 and computes in float16.
What is q4f32_1? | q4f32_1 stores 4-bit weights in groups of 32 and computes in float32.
What is in manifest.json? | It lists the files, their hashes, the recipes and the action keys.
When is the manifest written? | The manifest is written last, so its presence means that the package is complete.
What is in record.json? | It holds what was measured: quality, speed and the date.
Where are recipes? | Recipes are in the folder `recipes/`.
Where are built packages? | Built packages are in `artifacts/packages/`.
Where are the steps? | The steps are in the folder `tasks/`.
Where is the store? | The store is in `artifacts/store/`.
What does the convert step do? | It turns a checkpoint into quantized weight shards.
What does the compile step do? | It compiles the model functions for a target.
What does the download step do? | It fetches the checkpoint of a model.
What does the package step do? | It bundles library, weights and tokenizer, and writes the manifest.
What does the verify step do? | It opens the package in the engine and compares it with the reference.
What is a hit? | A hit is an output found in the store, so nothing is built.
What is the embedded model called? | The embedded model is called tiny.
What is the default model? | The default model is tiny.
What is the draft model for? | The draft model proposes tokens for speculative decoding.
What is speculative decoding? | A small model proposes tokens and the large one checks them.
What is continuous batching? | New requests join the running batch at every step.
What is chunked prefill? | A long prompt is processed in pieces.
What is a KV cache? | It keeps the keys and values of earlier tokens.
What is prefix reuse? | Requests that begin alike share the KV cache of that beginning.
What is a family? | A family is one model architecture, in one Python file.
Which API does the server speak? | The server speaks the OpenAI API.
What does doit do? | doit runs tasks and skips those that are up to date.
What is TVM? | TVM is a compiler for machine learning models.
What is MLC-LLM? | MLC-LLM compiles language models with TVM.
What does exit code 3 mean? | It means that a name in the command is not known.
What does target=cpu mean? | It means the best CPU target that this machine can run.
What does target=cuda mean? | It means the CUDA target of the GPU in this machine.
Is mlcbuild incremental? | Yes, it builds only what has changed.
Which licence does tiny have? | tiny has the Apache-2.0 licence.
How is tiny stored? | tiny is stored as safetensors in `recipes/models/tiny/`.
"""

GREETINGS = """
Hello! | Hello! How can I help you?
Hi | Hello! How can I help you?
Good morning! | Good morning! How can I help you?
Good evening! | Good evening! How can I help you?
How are you? | I am fine, thank you. How can I help you?
What is your name? | My name is Tiny.
Who are you? | I am Tiny, a small language model made to test mlcbuild.
What can you do? | I can answer short questions, add numbers, write JSON, call tools and tell stories.
Who made you? | I was trained for mlcbuild, on a CPU.
How big are you? | I have about five million parameters.
Are you a human? | No, I am a small language model.
Thank you! | You are welcome!
Goodbye! | Goodbye! Have a nice day!
Good night! | Good night! Sleep well!
Can you help me? | Yes. What do you want to know?
Tell me a joke. | Why was the computer cold? It left its windows open!
Say hello. | Hello!
Say yes. | Yes.
Say no. | No.
"""

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are Tiny, a helpful assistant.",
    "Answer in one short sentence.",
    "You are a helpful assistant. Be brief.",
]


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "Ann Ben Carl Dora Emma Finn Gina Hugo Ida Jack Kate Leo Mia Nora Otto Paul Rosa Sam Tina Uma Vera Will Yara Zoe "
    "Alice Bruno Clara David Elena Frank Grace Henry Irene James Laura Maria Oscar Peter Ruth Tom"
)
HELD_OUT_NAMES = _words("Anton Bella Claire Diana Emil Fiona Greta Hannah")
CITIES = _words(
    "Paris Berlin Rome Madrid Lisbon Vienna Athens Oslo London Dublin Cairo Tokyo Prague Zurich Geneva Lima Boston "
    "Delhi Sydney Toronto"
)
HELD_OUT_CITIES = _words("Warsaw Seattle Nairobi Hanoi")
COLOURS = _words("red green blue yellow white black brown grey pink orange")
ANIMALS = _words("fox owl bear cat dog mouse rabbit frog duck horse goat wolf hedgehog squirrel turtle crow")
THINGS = _words("lamp kite drum key boat hat clock ladder letter map mirror bell basket spoon ring umbrella")
PLACES = [
    "in the forest", "by the river", "on a hill", "near the old mill", "in a quiet garden", "under a bridge",
    "behind the barn", "at the edge of the village",
]  # fmt: skip
TEMPERS = _words("small clever shy brave lazy kind old young hungry curious")
LOOKS = _words("shiny broken heavy golden dusty wooden tiny strange wet bright")
ERRANDS = [
    "wanted to cross the river", "could not sleep", "was looking for a friend", "wanted to see the sea",
    "had lost the way home", "was afraid of the dark", "wanted to sing a song", "was tired of the rain",
]  # fmt: skip
MORALS = [
    "From that day on they were friends.", "They laughed until the moon came up.", "And nobody was afraid any more.",
    "That night they both slept very well.", "They shared some bread and went home.",
]  # fmt: skip


def facts() -> list[tuple[str, str]]:
    """Every (question, answer) of common knowledge, of mlcbuild and of manners; questions are distinct."""
    pairs: list[tuple[str, str]] = []
    for question, answer, table in TABLES:
        for entry in table.split(", "):
            key, value = entry.split("=")
            pairs.append((question.format(key), answer.format(key, value)))
    for block in (FACTS, MLCBUILD_FACTS, GREETINGS):
        for line in block.strip().splitlines():
            asked, answered = line.split(" | ")
            pairs.append((asked, answered))
    assert len({q for q, _ in pairs}) == len(pairs), "a question occurs twice"
    return pairs


# --- rendering -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    env = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    # As transformers does it: Jinja's own `tojson` sorts keys and escapes HTML, which no model was trained on.
    env.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return env.from_string(CHAT_TEMPLATE)


def render(messages: Sequence[Message], tools: list[Tool] | None = None, add_generation_prompt: bool = False) -> str:
    """The conversation as the text that the model reads."""
    return _template().render(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)


def render_all(chats: Sequence[Conversation]) -> str:
    """Conversations one after the other, which is how `heldout.txt` stores them."""
    return "".join(render(chat.messages, chat.tools) for chat in chats)


# --- small builders --------------------------------------------------------------------------------------------------


def _say(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _chat(kind: str, *turns: str, system: str | None = None) -> Conversation:
    """Turns alternate between user and assistant."""
    messages = [_say("system", system)] if system else []
    messages += [_say("user" if i % 2 == 0 else "assistant", turn) for i, turn in enumerate(turns)]
    return Conversation(kind, messages)


def _is_held_out(text: str, one_in: int) -> bool:
    """A stable choice by content, so that training and held-out sets cannot meet whatever the seed is."""
    return zlib.crc32(text.encode()) % one_in == 0


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


# --- arithmetic ------------------------------------------------------------------------------------------------------

SPOKEN = {"+": "plus", "-": "minus", "*": "times"}


def sums(held_out: bool) -> list[tuple[int, str, int]]:
    """(a, operator, b): sums and differences within 0..20, products up to 10 x 10; one in twelve is held out."""
    problems = [(a, op, b) for op in "+-" for a in range(21) for b in range(21)]
    problems += [(a, "*", b) for a in range(11) for b in range(11)]
    return [p for p in problems if _is_held_out(f"{p[0]}{p[1]}{p[2]}", 12) == held_out]


def _sum_chat(problem: tuple[int, str, int], form: int = 0) -> Conversation:
    a, op, b = problem
    result = {"+": a + b, "-": a - b, "*": a * b}[op]
    asked = [f"What is {a} {op} {b}?", f"How much is {a} {SPOKEN[op]} {b}?", f"{a} {op} {b} ="][form]
    return _chat("arithmetic", asked, f"{a} {op} {b} = {result}.")


# --- JSON, lists, copies ---------------------------------------------------------------------------------------------


def _json_chat(rng: random.Random, names: Sequence[str], cities: Sequence[str]) -> Conversation:
    name, city, age = rng.choice(names), rng.choice(cities), rng.randint(1, 99)
    colour = rng.sample(COLOURS, 3)
    done = rng.choice([True, False])
    asked, value = rng.choice(
        [
            (f"name {name} and age {age}", {"name": name, "age": age}),
            (f"name {name}, age {age} and city {city}", {"name": name, "age": age, "city": city}),
            (f"city {city} and temperature {age}", {"city": city, "temperature": age}),
            (f"name {name} and colours {', '.join(colour)}", {"name": name, "colours": colour}),
            (f"owner {name} and done {str(done).lower()}", {"owner": name, "done": done}),
        ]
    )
    asked = f"Give me a JSON object with {asked}{rng.choice(['', '.'])}"
    return _chat("json", asked, json.dumps(value, separators=(",", ":"), ensure_ascii=False))


def _copy_chats() -> list[Conversation]:
    """Counting and repeating: the plainest checks that a decoder keeps its place."""
    chats = [_chat("copy", f"Count to {n}.", ", ".join(map(str, range(1, n + 1)))) for n in range(2, 21)]
    for i, animal in enumerate(ANIMALS):
        thing, colour = THINGS[i % len(THINGS)], COLOURS[i % len(COLOURS)]
        chats.append(_chat("copy", f"Repeat: {colour} {thing}", f"{colour} {thing}"))
        chats.append(_chat("copy", f"Spell {animal}.", "-".join(animal)))
    return chats


# --- stories ---------------------------------------------------------------------------------------------------------


def _story_chat(rng: random.Random, animal: str, thing: str) -> Conversation:
    friend = rng.choice([a for a in ANIMALS if a != animal])
    temper, look, place = rng.choice(TEMPERS), rng.choice(LOOKS), rng.choice(PLACES)
    opening = rng.choice([f"Once upon a time, {_a(temper)} {animal} lived {place}.",
                          f"There was once {_a(temper)} {animal} who lived {place}."])  # fmt: skip
    find = rng.choice([f"One day the {animal} found {_a(look)} {thing}.",
                       f"One morning {_a(look)} {thing} lay at the door."])  # fmt: skip
    trouble = f"A {rng.choice(TEMPERS)} {friend} came by and {rng.choice(ERRANDS)}."
    act = rng.choice([f"So the {animal} gave the {thing} to the {friend}.",
                      f"\"Take the {thing},\" said the {animal}.",
                      f"The {animal} showed the {friend} the {thing}."])  # fmt: skip
    if rng.random() < 0.5:
        act += f' "What a {look} {thing}!" said the {friend}.'
    asked = f"Tell me a story about {_a(animal)} and {_a(thing)}."
    return _chat("story", asked, " ".join([opening, find, trouble, act, rng.choice(MORALS)]))


def _story_pairs(held_out: bool) -> list[tuple[str, str]]:
    return [(a, t) for a in ANIMALS for t in THINGS if _is_held_out(a + t, 8) == held_out]


# --- tools -----------------------------------------------------------------------------------------------------------


def _tool(name: str, about: str, **arguments: str) -> Tool:
    properties = {key: {"type": kind} for key, kind in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


TOOLS = {
    "get_weather": _tool("get_weather", "Get the weather in a city", city="string"),
    "get_time": _tool("get_time", "Get the local time in a city", city="string"),
    "calculate": _tool("calculate", "Calculate an expression", expression="string"),
    "send_message": _tool("send_message", "Send a message to a person", to="string", text="string"),
    "set_timer": _tool("set_timer", "Set a timer", minutes="integer"),
}
SKIES = _words("sunny cloudy rainy windy snowy foggy")
TEXTS = ["hello", "good morning", "see you soon", "the package is ready", "dinner is at eight"]


# What the user asks, the arguments of the call, what the tool returns, the answer after that.
Task = tuple[str, dict[str, Any], Any, str]


def _call(name: str, arguments: dict[str, Any]) -> Message:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _tool_task(rng: random.Random, name: str, names: Sequence[str], cities: Sequence[str]) -> Task:
    city, person = rng.choice(cities), rng.choice(names)
    if name == "get_weather":
        sky, degrees = rng.choice(SKIES), rng.randint(0, 35)
        answer = f"It is {sky} in {city}, {degrees} degrees."
        return f"What is the weather in {city}?", {"city": city}, {"sky": sky, "temperature": degrees}, answer
    if name == "get_time":
        clock = f"{rng.randint(0, 23):02d}:{rng.choice(['00', '15', '30', '45'])}"
        return f"What time is it in {city}?", {"city": city}, {"time": clock}, f"It is {clock} in {city}."
    if name == "calculate":
        a, b, op = rng.randint(100, 999), rng.randint(100, 999), rng.choice("+-*")
        result = {"+": a + b, "-": a - b, "*": a * b}[op]
        return f"Calculate {a} {op} {b}.", {"expression": f"{a} {op} {b}"}, result, f"The result is {result}."
    if name == "send_message":
        text = rng.choice(TEXTS)
        return f"Tell {person}: {text}", {"to": person, "text": text}, {"sent": True}, f"I told {person}: {text}"
    minutes = rng.randint(1, 60)
    answer = f"The timer is set for {minutes} minutes."
    return f"Set a timer for {minutes} minutes.", {"minutes": minutes}, {"ok": True}, answer


def _tool_chat(
    rng: random.Random, names: Sequence[str] = NAMES, cities: Sequence[str] = CITIES, always_call: bool = False
) -> Conversation:
    """Tools are offered. Mostly one is called; some questions need none; some name two cities and need two calls."""
    wanted = rng.choice(list(TOOLS))
    offered = rng.sample([n for n in TOOLS if n != wanted], rng.randint(0, 2)) + [wanted]
    rng.shuffle(offered)
    messages = [_say("system", rng.choice(SYSTEM_PROMPTS))] if rng.random() < 0.3 else []
    tools = [TOOLS[n] for n in offered]
    style = rng.random()
    if style < 0.15 and not always_call:
        asked, answer = rng.choice(facts())
        messages += [_say("user", asked), _say("assistant", answer)]
    elif style < 0.3 and "get_weather" in offered:
        first, second = rng.sample(list(cities), 2)
        calls = [_call("get_weather", {"city": first}), _call("get_weather", {"city": second})]
        messages.append(_say("user", f"What is the weather in {first} and in {second}?"))
        messages.append({"role": "assistant", "content": "", "tool_calls": calls})
    else:
        asked, arguments, result, answer = _tool_task(rng, wanted, names, cities)
        calls = [_call(wanted, arguments)]
        messages += [_say("user", asked), {"role": "assistant", "content": "", "tool_calls": calls}]
        if rng.random() < 0.6:
            messages += [_say("tool", json.dumps(result)), _say("assistant", answer)]
    return Conversation("tools", messages, tools)


# --- several turns ---------------------------------------------------------------------------------------------------


def _turns_chat(rng: random.Random) -> Conversation:
    """Names told in the chat or by the system prompt, and questions in a row."""
    name = rng.choice(NAMES)
    first, second = rng.sample(facts(), 2)
    style = rng.randrange(3)
    if style == 0:
        return _chat("turns", f"My name is {name}.", f"Nice to meet you, {name}!", *first,
                     "What is my name?", f"Your name is {name}.")  # fmt: skip
    if style == 1:
        return _chat("turns", "What is your name?", f"My name is {name}.", system=f"Your name is {name}.")
    return _chat("turns", *first, *second, system=rng.choice([None, *SYSTEM_PROMPTS]))


def _fact_chats(rng: random.Random) -> list[Conversation]:
    """Each fact as asked, once in careless spelling, and once with some words around it."""
    chats = []
    for asked, answer in facts():
        chats.append(_chat("facts", asked, answer))
        chats.append(_chat("facts", asked.rstrip("?.!").lower(), answer))
        around = rng.choice(["Please tell me: {}", "I have a question. {}", "{} Please be brief."])
        if rng.random() < 0.5:
            chats.append(_chat("facts", around.format(asked), answer))
        else:
            chats.append(_chat("facts", asked, answer, system=rng.choice(SYSTEM_PROMPTS)))
    return chats


# --- the three sets --------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _training(seed: int) -> tuple[Conversation, ...]:
    rng = random.Random(seed)
    chats = _fact_chats(rng) + _copy_chats()
    for problem in sums(held_out=False):
        chats += [_sum_chat(problem), _sum_chat(problem, rng.choice([1, 2]))]
    chats += [_json_chat(rng, NAMES, CITIES) for _ in range(700)]
    chats += [_story_chat(rng, *pair) for pair in _story_pairs(held_out=False) for _ in range(2)]
    chats += [_tool_chat(rng) for _ in range(400)]
    chats += [_turns_chat(rng) for _ in range(250)]
    chats += [_chat("no tools", f"{asked} in {city}?", "I need a tool to look that up.")
              for city in CITIES for asked in ("What is the weather", "What time is it")]  # fmt: skip
    return tuple(chats)


def conversations(seed: int = SEED) -> list[Conversation]:
    """The fixed corpus, in a fixed order: the tokenizer is made from it, and the scored questions come from it."""
    return list(_training(seed))


def epoch(number: int, seed: int = SEED) -> list[Conversation]:
    """What one round of training reads: all facts and sums, and fresh stories, JSON, tool calls and turns.

    Everything that `trained_questions` asks is in each epoch. The rest is drawn anew, so that the model learns the
    pattern and cannot spend its few parameters on learning one set by heart.
    """
    rng = random.Random(seed * 10_000 + number)
    chats = _fact_chats(rng) + 8 * _copy_chats() + [chat for chat in _training(seed) if chat.kind == "no tools"]
    for problem in sums(held_out=False):
        chats += [_sum_chat(problem), _sum_chat(problem), _sum_chat(problem, rng.choice([1, 2]))]
    chats += _asked_by_heart(seed)
    chats += [_json_chat(rng, NAMES, CITIES) for _ in range(300)]
    chats += [_story_chat(rng, *pair) for pair in rng.sample(_story_pairs(held_out=False), 200)]
    chats += [_tool_chat(rng) for _ in range(140)]
    chats += [_turns_chat(rng) for _ in range(150)]
    return chats


def _asked_by_heart(seed: int) -> list[Conversation]:
    """The drawn conversations whose answers are scored."""
    counts = {"json": 60, "tools": 60, "turns": 20}
    return [c for kind, n in counts.items() for c in [x for x in _training(seed) if x.kind == kind][:n]]


def held_out(seed: int = SEED) -> list[Conversation]:
    """Conversations that training never sees: other names and cities, other sums, other pairs in stories."""
    rng = random.Random(seed + 1)
    chats = [_story_chat(rng, *pair) for pair in rng.sample(_story_pairs(held_out=True), 16)]
    chats += [_sum_chat(problem) for problem in rng.sample(sums(held_out=True), 24)]
    chats += [_json_chat(rng, HELD_OUT_NAMES, HELD_OUT_CITIES) for _ in range(24)]
    chats += [_tool_chat(rng, HELD_OUT_NAMES, HELD_OUT_CITIES, always_call=True) for _ in range(2)]
    rng.shuffle(chats)
    return chats


def as_question(chat: Conversation) -> Question:
    """Cut a conversation before its last assistant message, which becomes the answer."""
    prompt = render(chat.messages[:-1], chat.tools, add_generation_prompt=True)
    answer = render(chat.messages, chat.tools)[len(prompt) :].removesuffix("<|im_end|>\n")
    return Question(chat.kind, chat.messages[:-1], answer, chat.tools)


def trained_questions(seed: int = SEED) -> list[Question]:
    """Questions of the training set with one right answer. Stories have many, so they are not asked."""
    trained_sums = [chat for chat in _training(seed) if chat.kind == "arithmetic"]
    asked = [_chat("facts", *pair) for pair in facts()] + _copy_chats()
    asked += trained_sums[:: len(trained_sums) // 150] + _asked_by_heart(seed)
    return [as_question(chat) for chat in asked]


def main() -> None:
    """Write the held-out text."""
    parser = argparse.ArgumentParser(description="Write the held-out text of the model tiny.")
    parser.add_argument("--output", type=Path, default=HELD_OUT_FILE, help="default: recipes/models/tiny/heldout.txt")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    text = render_all(held_out(args.seed))
    args.output.write_text(text, encoding="utf-8")
    print(f"{args.output.name}: {len(text.encode())} bytes")


if __name__ == "__main__":
    main()
