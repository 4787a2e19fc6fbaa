"""Word lists of the small world (all written for this generator)."""

S = str.split
NAMES = S(
    """Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mara Nora Oscar Paula Quinn Rosa Sam Tom Una Victor Wendy Yara Zoe
Alice Bruno Carl Daisy Eric Fiona George Hanna Ivan Julia Kevin Lena Max Nina Oliver Peter Rachel Simon Tessa Walter Martha Edgar Lucy Arthur Ruth
Hugo Iris Jonas Karla Lewis Mabel Nils Olga Piet Rupert Sally Theo Vera Willem Agnes Boris Celia Dora Elias Freya Gustav Hilda Igor Jenny Kurt Lydia
Milo Nelly Otto Pearl Ralph Sofia Toby Viola Wilma Adam Betty Colin Doris Edith Frank Greta Holly Irma James Karen Laura Marco Nadia"""
)
HELD_NAMES = S(
    "Bella Conrad Delia Ernest Flora Gordon Hester Isaac Judith Klaus Leila Morris Naomi Osric Petra Roland Stella Tilda Ulric Vincent"
)
JOBS = S(
    """baker farmer teacher doctor captain sailor gardener carpenter painter miller fisherman hunter cook nurse blacksmith shepherd weaver
merchant clerk printer potter tailor guard postman engineer librarian musician pilot judge mechanic cobbler beekeeper singer actor ferryman"""
)
PLACES = dict(
    x.split(":")
    for x in S(
        """kitchen:in garden:in barn:in cellar:in attic:in library:in market:at harbour:at bridge:on mill:at forest:in meadow:in tower:in
church:in school:at station:at bakery:in workshop:in stable:in cave:in hill:on river:at lake:at beach:on island:on village:in castle:in inn:at
lighthouse:in orchard:in greenhouse:in boathouse:in courtyard:in chapel:in museum:in theatre:in hospital:in shed:in cottage:in tent:in square:in
pier:on field:in valley:in well:at quarry:in farm:on office:in pantry:in balcony:on cabin:in deck:on hallway:in bedroom:in studio:in warehouse:in"""
    )
)
OBJECTS = S(
    """key lantern book map coin ring rope basket hammer knife cup bottle box letter clock bell drum flute violin hat coat scarf glove boot umbrella
candle mirror brush pen saw shovel bucket ladder net compass telescope kettle spoon plate jar blanket pillow ball kite doll puzzle stone feather shell
flag whistle wallet purse sack barrel needle thread broom pipe lamp magnet camera ticket stamp medal necklace bracelet crown shield sword bow arrow
anchor oar chart diary photograph notebook ribbon parcel trumpet axe chisel wrench teapot"""
)
COLOURS = S("red blue green yellow black white brown grey golden silver purple orange pink")
MATERIALS = S("wooden iron copper brass glass stone leather paper woollen silk clay tin bronze ivory")
ADJS = S(
    "old new small large heavy light broken shiny dusty rusty round square thin thick strange plain fine rare torn clean dirty polished little"
)
PADJ = S(
    "old young tall kind clever brave quiet cheerful patient careful lazy honest proud gentle strong shy busy hungry sleepy curious friendly careless polite stubborn wise"
)
FEEL = S(
    "happy sad tired angry hungry cold glad proud worried afraid lonely calm excited surprised bored hopeful thirsty nervous grateful pleased"
)
ANIMALS = S(
    """dog cat horse cow sheep goat pig hen duck goose rabbit mouse fox wolf bear deer owl crow sparrow seagull dolphin whale seal frog toad snake
turtle squirrel hedgehog donkey pony swan robin pigeon beetle butterfly bee spider otter badger"""
)
FOODS = S(
    "bread cheese soup apples pears plums cake honey butter fish rice beans potatoes carrots onions eggs porridge pancakes biscuits cherries grapes nuts tea milk jam pie stew tomatoes mushrooms noodles"
)
VEHICLES = S("cart boat train bicycle wagon carriage ferry truck sledge bus")
WEATHER = [
    "The sun was shining",
    "It was raining",
    "A cold wind blew from the north",
    "The sky was grey",
    "It was a warm day",
    "Snow was falling",
    "The air was still",
    "Thick fog lay over the land",
    "It was a bright morning",
    "Dark clouds covered the sky",
    "A light breeze came from the sea",
    "It was hot and dry",
    "Thunder rolled in the distance",
    "The night was clear and full of stars",
    "The ground was wet after the rain",
    "Frost covered the roofs",
]
TIMES = [
    "In the morning",
    "At noon",
    "In the afternoon",
    "In the evening",
    "Later that day",
    "After a while",
    "Soon",
    "The next day",
    "After lunch",
    "Before sunset",
    "At last",
    "A little later",
    "One hour later",
    "That night",
    "Early the next morning",
    "Meanwhile",
    "Then",
]
NUMS = S(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
)
DAYS = S("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = S("January February March April May June July August September October November December")
DIRS = S("north south east west north-east north-west south-east south-west")
SHIPS = S(
    "Swallow Petrel Albatross Seahorse Mermaid Dolphin Endeavour Fortune Hope Patience Victory Aurora Comet Heron Pelican Nightingale Neptune Triton Gull Voyager"
)
CODEKEYS = S(
    """harbour gate tower vault cellar garden bridge castle office station locker safe garage archive engine cabin chapel museum laboratory storeroom
attic library warehouse kitchen stable hospital school theatre bakery lighthouse radio signal alarm door tunnel pump silo depot dock elevator greenhouse"""
)
HELD_CODEKEYS = S("observatory chamber balcony customs furnace granary mailroom parking reactor treasury")
OPP = dict(
    x.split(":")
    for x in S(
        "hot:cold big:small old:young wet:dry day:night up:down open:closed full:empty fast:slow happy:sad rich:poor hard:soft light:dark long:short high:low strong:weak early:late clean:dirty left:right good:bad first:last loud:quiet thick:thin"
    )
)
CAPITALS = dict(
    x.split(":")
    for x in S(
        """France:Paris Germany:Berlin Italy:Rome Spain:Madrid England:London Ireland:Dublin Portugal:Lisbon Austria:Vienna Greece:Athens Norway:Oslo
Sweden:Stockholm Finland:Helsinki Denmark:Copenhagen Poland:Warsaw Hungary:Budapest Russia:Moscow China:Beijing Japan:Tokyo India:Delhi Egypt:Cairo Kenya:Nairobi Canada:Ottawa Cuba:Havana Peru:Lima Chile:Santiago Turkey:Ankara Iran:Tehran Belgium:Brussels"""
    )
)
COLFACT = dict(
    x.split(":")
    for x in S(
        "grass:green snow:white coal:black blood:red gold:yellow milk:white chocolate:brown spinach:green ash:grey lemons:yellow carrots:orange"
    )
)
SOUNDS = dict(
    x.split(":")
    for x in S(
        "dog:barks cat:meows cow:moos horse:neighs sheep:bleats lion:roars duck:quacks owl:hoots frog:croaks bee:buzzes snake:hisses wolf:howls crow:caws pig:grunts"
    )
)
ON = S("b br c d dr f fl g gr h j k kr l m n p pr qu r s sh st t th tr v w z sk sl")
VO = S("a e i o u a e i o u ai ee oo ou")
CO = S("b ck d f g l ll m n nd ng p r rn rt s ss st t th x sk lm mp")
