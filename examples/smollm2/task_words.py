"""Templates and word lists of the two demo tasks, train and demo apart. Data only, no code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Split:
    """One split of a task: templates by label, and the word list of each slot."""

    templates: dict[str, list[str]]
    words: dict[str, list[str]]


def words(**lists: str) -> dict[str, list[str]]:
    """Word lists written as comma-separated strings."""
    return {slot: [word.strip() for word in text.split(",")] for slot, text in lists.items()}


SENTIMENT = {
    "train": Split(
        templates={
            "positive": [
                "The {thing} was {pos} and the {thing2} was even better.",
                "I bought the {product} last {time} and it has been {pos} ever since.",
                "What a {pos} {thing}, I would come back for the {thing2} alone.",
                "The {thing} is {pos}, and my {person} thinks so too.",
                "I expected a {neg} {thing}, but it turned out to be {pos}.",
                "Not a {neg} moment in it: the {thing} is {pos} from start to finish.",
                "My {person} gave me this {product}, and I find it {pos}.",
                "After one {time} with the {product} I can say that it is {pos}.",
                "{pos} {thing}, {pos2} {thing2}, and a fair price.",
                "Everybody at the table called the {thing} {pos}.",
                "I was ready to complain about the {thing}, yet it was {pos}.",
                "The {product} does what it says, and the {thing} is {pos}.",
            ],
            "negative": [
                "The {thing} was {neg} and the {thing2} was even worse.",
                "I bought the {product} last {time} and it has been {neg} ever since.",
                "What a {neg} {thing}, I will not come back, not even for the {thing2}.",
                "The {thing} is {neg}, and my {person} thinks so too.",
                "I expected a {pos} {thing}, but it turned out to be {neg}.",
                "Not one {pos} moment in it: the {thing} is {neg} from start to finish.",
                "My {person} gave me this {product}, and I find it {neg}.",
                "After one {time} with the {product} I can say that it is {neg}.",
                "{neg} {thing}, {neg2} {thing2}, and far too expensive.",
                "Everybody at the table called the {thing} {neg}.",
                "I was ready to praise the {thing}, yet it was {neg}.",
                "The {product} does not do what it says, and the {thing} is {neg}.",
            ],
        },
        words=words(
            thing="service, soup, story, ending, music, staff, view, room, sound, picture, "
            "cake, acting, design, menu, breakfast, plot",
            product="phone, blender, backpack, lamp, keyboard, jacket, tent, camera, kettle, "
            "mattress, headset, notebook",
            person="sister, uncle, neighbor, boss, daughter, roommate, cousin",
            time="week, month, summer, Friday, winter, year",
            pos="excellent, wonderful, charming, delightful, brilliant, lovely, superb, great, "
            "fantastic, pleasant, perfect, impressive, beautiful, reliable",
            neg="terrible, awful, boring, horrible, dreadful, dull, disappointing, poor, bad, "
            "annoying, useless, shabby, ugly, unreliable",
        ),
    ),
    "demo": Split(
        templates={
            "positive": [
                "If you ask me, the {thing} could not have been more {pos}.",
                "We left with a smile, because the {thing} was so {pos}.",
                "Five stars: this {product} is {pos}.",
                "People warned me that the {thing} is {neg}, and they were wrong, it is {pos}.",
                "I tell all of my friends how {pos} this {product} is.",
            ],
            "negative": [
                "If you ask me, the {thing} could not have been more {neg}.",
                "We left early, because the {thing} was so {neg}.",
                "One star: this {product} is {neg}.",
                "People told me that the {thing} is {pos}, and they were wrong, it is {neg}.",
                "I warn all of my friends how {neg} this {product} is.",
            ],
        },
        words=words(
            thing="concert, waiter, dessert, museum, lecture, hotel, garden, script",
            product="toaster, bicycle, watch, printer, umbrella, game",
            pos="amazing, outstanding, enjoyable, marvelous, splendid, comfortable, terrific",
            neg="miserable, tedious, disgusting, pathetic, dismal, uncomfortable, rotten",
        ),
    ),
}

TOPIC = {
    "train": Split(
        templates={
            "World": [
                "{country} and {country2} sign a peace treaty after long talks",
                "President of {country} visits {country2} for the first time",
                "Thousands march through the capital of {country} to demand {demand}",
                "{country} closes its border with {country2}",
                "Parliament of {country} votes on {demand}",
                "{body} calls a meeting on the crisis in {country}",
                "Prime minister of {country} resigns over {scandal}",
                "{body} sends aid to {country} after the {disaster}",
                "Ambassador of {country} is called home from {country2}",
                "Voters in {country} choose a new government",
            ],
            "Sports": [
                "{team} beat {team2} in the {event}",
                "{team} sign a new {player} before the season",
                "Injured {player} will miss the {event}",
                "{player} of {team} scores twice in the last minutes",
                "{team} dismiss their coach after five defeats",
                "Young {player} wins gold at the {event}",
                "{team} reach the {event} for the first time",
                "Record crowd watches {team} play {team2}",
                "{player} breaks a record at the {event}",
                "Referee under fire after {team} lose the {event}",
            ],
            "Business": [
                "{company} reports higher profits for the {quarter}",
                "Shares of {company} fall after a weak {quarter}",
                "{company} buys {company2} in a large deal",
                "{company} will cut jobs at its {plant}",
                "Central bank raises interest rates as {price} climbs",
                "{company} opens a new {plant} and hires workers",
                "Investors worry about {price}",
                "{company} and {company2} plan a merger",
                "Chief executive of {company} steps down after the {quarter}",
                "Stock market rises on hopes for lower {price}",
            ],
            "Science": [
                "Researchers find {finding} in {place}",
                "New {device} helps scientists study {subject}",
                "Study explains how {animal} {ability}",
                "Telescope takes a picture of {space}",
                "Scientists build a {device} that measures {subject}",
                "Fossil from {place} shows how {animal} once lived",
                "Space probe on its way to {space} sends its first data",
                "Laboratory experiment sheds light on {subject}",
                "Biologists discover that {animal} {ability}",
                "Astronomers find water on {space}",
            ],
        },
        words=words(
            country="Brazil, Kenya, Norway, India, Chile, Egypt, Poland, Vietnam, Canada, Greece, "
            "Nigeria, Japan, Turkey, Peru",
            demand="new elections, a free press, lower taxes, land reform, a new constitution",
            body="United Nations, European Union, Red Cross, African Union",
            scandal="a bribery affair, a secret letter, a failed reform",
            disaster="earthquake, flood, hurricane, drought",
            team="Rovers, Falcons, United, Tigers, Wolves, Dynamo, Lakers, Sharks, Rangers",
            player="striker, goalkeeper, sprinter, swimmer, quarterback, pitcher, tennis player",
            event="cup final, semifinal, world championship, derby, Olympic Games, playoffs",
            company="Norwind, Alpha Motors, Bluebank, Terra Foods, Hexa, Orbit Airlines, Kessler, "
            "Granite Oil, Finch Media",
            quarter="third quarter, first quarter, holiday quarter, fiscal year",
            plant="factory, warehouse, head office, car plant",
            price="inflation, oil prices, energy costs, debt, unemployment",
            finding="a new species, an ancient virus, traces of life, a rare mineral",
            place="Arctic ice, a deep cave, the rain forest, the desert, old rock, the ocean floor",
            device="microscope, laser, sensor, computer model, satellite",
            subject="brain cells, climate change, dark matter, gravity, enzymes, ocean currents",
            animal="dolphins, ants, dinosaurs, crows, whales, bats, octopuses",
            ability="find their way, remember faces, sleep, learn from each other, see in the dark",
            space="Mars, a distant galaxy, a black hole, Jupiter, a comet, a young star",
        ),
    ),
    "demo": Split(
        templates={
            "World": [
                "Foreign ministers of {country} and {country2} meet for talks on {issue}",
                "State of emergency in {country} after {unrest}",
                "Opposition leader in {country} returns from exile",
                "Rebels in {country} agree to a ceasefire",
            ],
            "Sports": [
                "{team} win at home and climb to the top of the league",
                "{athlete} takes the title after a close race",
                "Fans celebrate as {team} lift the trophy",
                "{athlete} retires after a long career on the field",
            ],
            "Business": [
                "{firm} lowers its sales forecast for the year",
                "Retailer {firm} files for bankruptcy",
                "{firm} raises money from investors before going public",
                "Dividend of {firm} disappoints shareholders",
            ],
            "Science": [
                "Physicists measure {quantity} more exactly than ever",
                "Gene found that protects {creature} from disease",
                "Chemists make a material that stores {quantity}",
                "DNA of {creature} reveals their origin",
            ],
        },
        words=words(
            country="Bolivia, Ghana, Finland, Nepal, Ukraine, Jordan, Cuba",
            issue="refugees, fishing rights, trade sanctions, nuclear arms",
            unrest="riots, a coup attempt, a landslide",
            team="Comets, Albion, Panthers, Bulls, Hawks",
            athlete="cyclist, skier, boxer, marathon runner, rookie",
            firm="Lindqvist, Solaris Steel, Marble Telecom, Harbor Insurance, Quill",
            quantity="heat, light, magnetism, hydrogen",
            creature="coral, honeybees, mammoths, wheat, tortoises",
        ),
    ),
}
