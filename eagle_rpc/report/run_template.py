"""The template of `report.html`, which `page.write_page` puts into a page, and its style."""

SHADES = 6
"""Positions of guesses with a shade of their own."""

STYLE = """
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .7rem; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; min-width: 0; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1.2rem; }
figure { margin: 0; min-width: 0; } figcaption { font-weight: 600; margin-bottom: .2rem; }
li { margin: .3rem 0; overflow-wrap: anywhere; }
details { margin: .6rem 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
pre.text { line-height: 1.7; } span.key { border-radius: 3px; padding: 0 .4rem; white-space: nowrap; }
""" + "".join(
    f".p{shade} {{ background: color-mix(in srgb, var(--accept) {12 + 11 * shade}%, transparent); }}\n"
    for shade in range(1, SHADES + 1)
)
TEMPLATE = """\
{% macro grid(section) %}
<div class="charts">{% for title, name in section %}
<figure><figcaption>{{ title }}</figcaption><div id="{{ name }}"></div></figure>
{% endfor %}</div>
{% endmacro %}
<div class="tiles">{% for label, value, more in tiles %}
<div class="tile"><span class="dim">{{ label }}</span><b>{{ value }}</b><span class="dim">{{ more }}</span></div>
{% endfor %}</div>
<h2>What to do next</h2>
{% if advice %}<ul>{% for line in advice %}<li>{{ line }}</li>{% endfor %}</ul>
{% else %}<p>Nothing stands out in the figures of this page.</p>{% endif %}
{% for title, text, names in sections %}
<h2>{{ title }}</h2>
<p class="dim">{{ text }}</p>
{{ grid(names) }}
{% endfor %}
{% if workers %}<h2>Workers</h2><table><tr><th>worker</th><th>figures</th></tr>
{% for name, line in workers %}<tr><td>{{ name }}</td><td>{{ line }}</td></tr>{% endfor %}</table>{% endif %}
{% if rows %}<h2>Drafts in figures</h2><table><tr><th></th>
{% for head in rows[0] %}<th>{{ head }}</th>{% endfor %}</tr>
{% for row in rows[1:] %}<tr>{% for cell in row %}<td{% if loop.first %} class="path"{% endif %}>{{ cell }}</td>\
{% endfor %}</tr>{% endfor %}</table>{% endif %}
{% if texts %}<h2>Texts</h2>
<p>Without colour: the target's own tokens. Coloured: guesses that it accepted, by position:
{% for shade in range(1, shades + 1) %}<span class="key p{{ shade }}">{{ shade }}{{ "+" if shade == most }}</span>
{% endfor %}</p>
{% for one in texts %}<details{% if loop.index <= 3 %} open{% endif %}>
<summary>{{ one.title }}</summary>
<pre class="text"><span class="dim">{{ one.prompt }}</span>{% for words, shade in one.pieces %}\
{% if shade %}<span class="p{{ shade }}">{{ words }}</span>{% else %}{{ words }}{% endif %}{% endfor %}</pre>
</details>{% endfor %}{% endif %}
<h2>Conditions</h2>
<table>{% for name, value in conditions %}<tr><td>{{ name }}</td><td class="path">{{ value }}</td></tr>
{% endfor %}</table>
{% if config %}<details><summary>Configuration</summary><pre>{{ config }}</pre></details>{% endif %}
<script>{{ library }}</script>
<script>
const charts = {{ charts | tojson }};
function themed(layout) {
  const css = getComputedStyle(document.documentElement), ink = css.getPropertyValue("--ink").trim();
  const line = css.getPropertyValue("--line").trim(), paper = css.getPropertyValue("--paper").trim();
  const axis = (one) => ({...one, gridcolor: line, linecolor: line, tickcolor: line, fixedrange: true});
  return {...layout, font: {color: ink, family: "system-ui, sans-serif", size: 12},
    xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis),
    hoverlabel: {bgcolor: paper, bordercolor: line, font: {color: ink}}};
}
function draw() {
  const color = getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
  for (const [name, chart] of Object.entries(charts))
    Plotly.react(name, chart.data.map((one) => one.error_y ? {...one, error_y: {...one.error_y, color}} : one),
      themed(chart.layout), {responsive: true, displayModeBar: false});
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
</script>
"""
