"""The closed list of words that scenes may show: short, common, lower case, 3 to 6 letters.

None of them occurs in a question or an answer template, so the tokenizer spells each one letter by letter
and reading a word is reading its letters.
"""

from __future__ import annotations

_TEXT = """
acorn actor album alarm angel ankle apple april apron arena arrow atlas attic
autumn baby bacon badge bagel baker banjo basket beach beaver berry bird bison
blade boat bonus boots bottle bowl bread brick bridge brush bucket bus
butter cabin cable cactus camel camera candle candy canoe canyon carpet carrot
castle cave cello cereal chain chair chalk cheese cherry chess chick cider
cinema circus clay cliff clock cloud clover coast cobra coffee comet copper
coral corn cotton cousin crab crane crown cube curry cycle daisy dance
desert desk diary dinner diver doctor dog dollar donkey door dragon dream
drum duck eagle earth echo elbow ember engine envoy fabric falcon farm
farmer fence ferry fiddle field finger fire fish flag flame flute fog
forest fork fox friend frog fruit galaxy garden garlic gate giant ginger
glass globe glove goat goose grape grass guitar hammer harbor harp
hawk hazel heart helmet hero hill honey horse hotel house hut ice
igloo index inkpot iris island ivory ivy jacket jam jelly jewel jigsaw
judge juice jungle kayak kettle key king kite kitten knee knife koala
ladder lake lamp laptop lava lemon letter lily lion lizard lobby lotus
lunch magnet mango maple marble market mask meadow medal melon milk mirror
mole monkey moon mosaic motor mouse muffin museum nail napkin needle
nest night nurse oasis ocean office olive onion orbit otter oven owl
oxygen oyster pace paddle palace palm panda paper parrot pasta
peach peanut pearl pencil pepper piano pigeon pillow pilot pirate pizza planet plum
pocket poem pond poppy potato prince puppet puzzle quartz queen quilt rabbit radar
radio rain ranch raven ribbon rice river robin robot rocket roof rope
ruby saddle salad salmon sand school scout seed sheep shelf ship shoe
silk silver singer sky sleigh snail snow soap sofa spider spoon spring
statue stone stove sugar summer sun swan table tailor temple tennis
ticket tiger toast tomato torch towel tower train tulip tunnel turtle
uncle valley vase velvet violin wagon walnut water whale wheat
wheel willow window winter wizard wolf wool yacht yogurt zebra
"""

WORDS: tuple[str, ...] = tuple(word for word in _TEXT.split() if 3 <= len(word) <= 6)
