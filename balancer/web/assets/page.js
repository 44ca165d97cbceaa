// The status page of nlb. It shows what api/v1/stream tells and changes nothing.
//
// Whatever comes from the daemon is text: nodes are made by el and text is set by
// put. Nothing here makes HTML of a string, and the page's policy forbids it.

const windowMs = 5 * 60 * 1000; // of the sparklines, as the daemon remembers
const silenceMs = 10 * 1000;    // five events late
const retryMs = 10 * 1000;
const fewTargets = 60;          // so many are shown without being asked for
const troubled = 3;             // targets shown of a group that is collapsed
const page = 100;               // targets shown of one that is not, at a time
const remembered = 50;          // changes
const askable = 1000;           // targets that an answer about the past may have

const states = ['healthy', 'initial', 'unhealthy', 'unhealthy.draining', 'draining', 'unused'];
// The shape says it too: colours alone tell nothing to many people.
const shapes = {
  'healthy': 'M2 8.5l4 4 8-9',
  'initial': 'M8 2a6 6 0 1 0 6 6',
  'unhealthy': 'M3 3l10 10M13 3L3 13',
  'unhealthy.draining': 'M3 3l10 10M13 3L3 13M2 15h12',
  'draining': 'M8 1v12M3 8l5 5 5-5',
  'unused': 'M3 8h10',
};

const $ = (id) => document.getElementById(id);
const svgNS = 'http://www.w3.org/2000/svg';

function el(name, attributes = {}, ...children) {
  const svg = ['svg', 'path'].includes(name);
  const node = svg ? document.createElementNS(svgNS, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function set(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

const toneOf = (state) => 's-' + state.replace('.', '-');
const portOf = (address, port) => (address.includes(':') ? `[${address}]:${port}` : `${address}:${port}`);
const targetName = (t) => portOf(t.address, t.port);
const isTrouble = (t) => t.state !== 'healthy' && t.state !== 'unused';

// ---- words ----

// age is what nlb status prints.
function age(ms) {
  const s = Math.max(0, Math.floor(ms / 1000)), two = (n) => String(n).padStart(2, '0');
  if (s < 60) return `${s}s`;
  if (s < 3600) return `${Math.floor(s / 60)}m${two(s % 60)}s`;
  if (s < 86400) return `${Math.floor(s / 3600)}h${two(Math.floor(s / 60) % 60)}m`;
  return `${Math.floor(s / 86400)}d${two(Math.floor(s / 3600) % 24)}h`;
}

// scaled is a number short enough to read, and k, M, G or T.
function scaled(n) {
  if (n == null) return ['?', ''];
  let i = 0;
  for (; n >= 1000 && i < 4; i++) n /= 1000;
  return [n.toFixed(Number.isInteger(n) || n >= 100 ? 0 : 1), ['', 'k', 'M', 'G', 'T'][i]];
}

function rateWords([active, flows, bytes]) {
  const [b, prefix] = scaled(bytes);
  return `${scaled(flows).join('')} new/s · ${active == null ? '?' : active.toLocaleString('en')} active · ${b} ${prefix}B/s`;
}

function counted(targets) {
  const by = new Map();
  for (const t of targets) by.set(t.state, (by.get(t.state) ?? 0) + 1);
  return states.filter((s) => by.has(s)).map((s) => [s, by.get(s)]);
}

const countWords = (targets) => counted(targets).map(([state, n]) => `${n} ${state}`).join(', ') || 'no targets';

// ---- what is known ----

const known = {
  status: null,
  rates: {},         // by group: [active, flows, bytes] of each target
  listenerRates: {}, // by listener
  skew: 0,           // the daemon's clock minus the browser's, in ms
  at: 0,             // of the last event, by the daemon's clock, in ms
};
const nothingKnown = [null, null, null];

const now = () => Date.now() + known.skew;

const plus = (a, b) => (a == null ? b : b == null ? a : a + b);
const sum = (points) => points.reduce((a, b) => a.map((x, i) => plus(x, b[i])), nothingKnown);

// Series are kept for what has a sparkline: by key, times and new flows per second.
const series = new Map();

function remember(key, at, rate) {
  const s = series.get(key) ?? { at: [], rate: [] };
  series.set(key, s);
  if (s.at.length && s.at.at(-1) >= at) return;
  s.at.push(at);
  s.rate.push(rate);
  const stale = s.at.findIndex((t) => t > at - windowMs);
  s.at.splice(0, stale);
  s.rate.splice(0, stale);
}

// recall puts what the daemon remembers before what was seen here.
function recall(key, times, rates) {
  const seen = series.get(key) ?? { at: [], rate: [] };
  const first = seen.at[0] ?? Infinity;
  const older = times.findIndex((t) => t >= first);
  const n = older < 0 ? times.length : older;
  series.set(key, { at: times.slice(0, n).concat(seen.at), rate: rates.slice(0, n).concat(seen.rate) });
}

const unrecalled = new Set(); // groups of which targets are shown whose past was not asked for

// recallAll asks for the past of what is shown, as many targets at a time as the
// daemon answers for. Without an answer the sparklines begin now.
async function recallAll() {
  const sizes = new Map(known.status.target_groups.map((g) => [g.name, g.targets.length]));
  const batches = [[]];
  let size = 0;
  for (const name of unrecalled) {
    const n = sizes.get(name) ?? 0;
    if (n > askable) continue;
    size += n;
    if (size > askable) {
      batches.push([]);
      size = n;
    }
    batches.at(-1).push(name);
  }
  unrecalled.clear();
  for (const groups of batches) {
    try {
      const response = await fetch(`api/v1/history?${new URLSearchParams(groups.map((g) => ['target_group', g]))}`);
      if (response.ok) recallHistory(await response.json());
    } catch {
      return; // the stream tells that the daemon is gone
    }
  }
  draw();
}

function recallHistory(h) {
  const times = h.at.map((t) => Date.parse(t));
  for (const l of h.listeners) recall(`l ${l.name}`, times, l.new_flows_per_second);
  for (const g of h.target_groups) {
    recall(`g ${g.name}`, times, g.new_flows_per_second);
    for (const t of g.targets ?? []) recall(`t ${g.name} ${targetName(t)}`, times, t.new_flows_per_second);
  }
}

// ---- sparklines ----

function newSpark(what) {
  const fill = el('path', { class: 'fill' }), line = el('path');
  const node = el('svg', { class: 'spark', viewBox: '0 0 100 24', preserveAspectRatio: 'none', role: 'img' }, fill, line);
  return {
    node,
    draw(key) {
      const s = series.get(key) ?? { at: [], rate: [] };
      const peak = Math.max(0, ...s.rate.filter((r) => r != null));
      let d = '', area = '', from = null;
      s.rate.forEach((r, i) => {
        const x = (100 - (known.at - s.at[i]) / windowMs * 100).toFixed(2);
        if (r == null) { // a gap
          if (from != null) area += `V24H${from}Z`;
          from = null;
          return;
        }
        const y = (22.5 - (peak && r / peak) * 21).toFixed(2);
        d += `${from == null ? 'M' : 'L'}${x} ${y}`;
        area += from == null ? `M${x} 24V${y}` : `L${x} ${y}`;
        from ??= x;
      });
      if (from != null) area += 'V24Z';
      set(line, 'd', d);
      set(fill, 'd', area);
      set(node, 'aria-label', `${what}: new flows per second in the last five minutes, at most ${scaled(peak).join('')}`);
    },
  };
}

function newRate(what) {
  const spark = newSpark(what), words = el('span');
  return {
    node: el('div', { class: 'rate' }, spark.node, words),
    draw(key, point) {
      spark.draw(key);
      put(words, rateWords(point));
    },
  };
}

// ---- cards ----

function stateIcon(state) {
  return el('svg', { viewBox: '0 0 16 16', 'aria-hidden': 'true' }, el('path', { d: shapes[state] ?? shapes.unused }));
}

function newListener(name) {
  const title = el('strong', {}, name), where = el('span', { class: 'mono' }), to = el('p', { class: 'muted' }), rate = newRate(`listener ${name}`);
  const node = el('div', { class: 'node listener', role: 'group', 'aria-label': `listener ${name}` },
    el('div', { class: 'head' }, title, where), to, rate.node);
  return {
    node,
    draw(l) {
      put(where, `${l.protocol} ${portOf(l.vip, l.port)}`);
      put(to, '→ ' + l.forward.map((f) => (l.forward.length > 1 ? `${f.target_group} (weight ${f.weight})` : f.target_group)).join(', '));
      const point = known.listenerRates[name] ?? nothingKnown;
      // Flows are counted by target: of groups that listeners share, nobody knows through which.
      rate.node.hidden = point.every((x) => x == null);
      rate.draw(`l ${name}`, point);
    },
  };
}

function newTarget(group, name) {
  const state = el('span', { class: 'state' }), since = el('span', { class: 'muted' }), reason = el('p'), notes = el('p', { class: 'muted' });
  const left = el('progress', { max: '1' }), rate = newRate(`target ${name}`);
  const node = el('li', { class: 'node target', 'data-target': name },
    el('div', { class: 'cols' },
      el('div', { class: 'head' }, el('span', { class: 'mono' }, name), state, since), rate.node),
    reason, notes, left);
  const card = {
    node,
    draw(t, point) {
      card.target = t;
      set(node, 'class', `node target ${toneOf(t.state)}`);
      if (state.dataset.state !== t.state) {
        state.dataset.state = t.state;
        state.replaceChildren(stateIcon(t.state), t.state);
      }
      put(reason, [t.reason, t.description].filter(Boolean).join(': '));
      reason.hidden = !reason.textContent;
      rate.draw(`t ${group} ${name}`, point);
      card.tick();
    },
    // tick draws what time changes.
    tick() {
      const t = card.target;
      put(since, `for ${age(now() - Date.parse(t.since))}`);
      set(since, 'title', `since ${t.since}`);
      const words = [];
      if (t.until) words.push(`${age(Date.parse(t.until) - now())} left`);
      if (t.effective_weight !== t.weight) words.push(t.effective_weight === 0 ? 'no new flows' : `weight ${t.effective_weight} of ${t.weight}`);
      else if (t.weight !== 1) words.push(`weight ${t.weight}`);
      if (t.client_ip) words.push(t.client_ip);
      if (t.ends_flows_until && Date.parse(t.ends_flows_until) > now()) words.push('its flows are being ended');
      if (t.held) words.push(`held by passive health: ${t.held.failures} failed connections, ${age(Date.parse(t.held.until) - now())} left`);
      if (t.removed) words.push('not in the file any more');
      put(notes, words.join(' · '));
      notes.hidden = words.length === 0;
      left.hidden = !t.until;
      if (t.until) {
        const until = Date.parse(t.until), all = Math.max(1, until - Date.parse(t.since));
        left.value = Math.min(1, Math.max(0, (until - now()) / all));
        set(left, 'aria-label', `time left of ${name}'s ${t.state}`);
      }
    },
  };
  return card;
}

function newRow(name) {
  const title = el('h2', {}, name), kind = el('span', { class: 'muted' });
  const open = el('p', { class: 'loud', hidden: '' }, 'FAIL OPEN: all targets take flows');
  const bar = el('div', { class: 'bar', 'aria-hidden': 'true' }), words = el('p'), rate = newRate(`target group ${name}`);
  const toggle = el('button', { type: 'button' });
  const card = el('div', { class: 'node group' }, el('div', { class: 'head' }, title, kind), open, words, bar, rate.node, toggle);
  const none = el('p', { class: 'muted' }, 'no listener');
  const listeners = el('div', { class: 'listeners' }, none), list = el('ul', { class: 'targets', 'aria-label': `targets of ${name}` });
  const more = el('button', { type: 'button', hidden: '' });
  const node = el('section', { class: 'row', 'data-group': name, 'aria-label': `target group ${name}` },
    listeners, card, el('div', { class: 'column' }, list, more));
  const row = { node, card, listeners, none, more, targets: new Map(), limit: page };
  toggle.addEventListener('click', () => { setExpanded(name, !isExpanded(name)); redraw(); });
  more.addEventListener('click', () => {
    if (isExpanded(name) || view.filtering()) row.limit += page; else setExpanded(name, true);
    redraw();
  });

  row.draw = (g, shown, collapsed) => {
    put(kind, `${g.protocol} · ${g.client_ip}`);
    open.hidden = !g.fail_open;
    card.classList.toggle('open', g.fail_open);
    put(words, countWords(g.targets));
    bar.replaceChildren(...counted(g.targets).map(([state, n]) => {
      const part = el('span', { class: toneOf(state) });
      part.style.flexGrow = n;
      return part;
    }));
    rate.draw(`g ${name}`, sum(known.rates[name] ?? []));
    const rates = new Map(g.targets.map((t, i) => [targetName(t), known.rates[name]?.[i] ?? nothingKnown]));
    const limit = collapsed ? troubled : row.limit;
    const visible = shown.slice(0, limit);
    const keep = new Set(visible.map(targetName));
    for (const [key, t] of row.targets) {
      if (keep.has(key)) continue;
      t.node.remove();
      row.targets.delete(key);
      series.delete(`t ${name} ${key}`);
    }
    visible.forEach((t, i) => {
      const key = targetName(t);
      if (!row.targets.has(key)) {
        row.targets.set(key, newTarget(name, key));
        unrecalled.add(name);
      }
      const target = row.targets.get(key);
      target.draw(t, rates.get(key));
      if (list.children[i] !== target.node) list.insertBefore(target.node, list.children[i] ?? null);
    });
    list.hidden = visible.length === 0;
    const rest = (collapsed ? g.targets.length : shown.length) - visible.length;
    more.hidden = rest <= 0;
    if (!collapsed) put(more, `Show ${Math.min(rest, page)} more of ${rest}`);
    else put(more, visible.length > 0 ? `Show ${rest} more` : `Show ${rest} targets`);
    toggle.hidden = view.filtering() || g.targets.length === 0;
    put(toggle, collapsed ? 'Expand' : 'Collapse');
    set(toggle, 'aria-expanded', String(!collapsed));
    set(toggle, 'aria-label', `${collapsed ? 'Expand' : 'Collapse'} ${name}`);
  };
  return row;
}

// ---- the topology ----

const view = {
  rows: new Map(),
  listeners: new Map(),
  expanded: new Map(), // by group, what was asked for
  expandAll: null,     // what was asked for of all; null: nothing
  query: '',
  only: new Set(),     // states
  filtering: () => view.query !== '' || view.only.size > 0,
};

function isExpanded(name) {
  if (view.expanded.has(name)) return view.expanded.get(name);
  return view.expandAll ?? known.status.target_groups.reduce((n, g) => n + g.targets.length, 0) <= fewTargets;
}

function setExpanded(name, is) {
  view.expanded.set(name, is);
  if (!is) view.rows.get(name).limit = page;
}

// shownOf lists the targets of a group that the filter lets through; null hides the group.
function shownOf(g, listeners, collapsed) {
  const passes = g.targets.filter((t) => view.only.size === 0 || view.only.has(t.state));
  if (view.only.size > 0 && passes.length === 0) return null;
  const has = (...texts) => texts.some((text) => text.toLowerCase().includes(view.query));
  if (view.query !== '' && !has(g.name, g.client_ip, ...listeners.flatMap((l) => [l.name, portOf(l.vip, l.port)]))) {
    const found = passes.filter((t) => has(targetName(t), t.state, t.reason, t.description));
    return found.length > 0 ? found : null;
  }
  return collapsed ? passes.filter(isTrouble) : passes;
}

function drawRows() {
  const { listeners, target_groups: groups } = known.status;
  const leading = new Map(groups.map((g) => [g.name, []])), home = new Map();
  for (const l of listeners) {
    for (const f of l.forward) leading.get(f.target_group)?.push(l);
    const first = l.forward.find((f) => leading.has(f.target_group))?.target_group;
    if (first != null) home.set(l.name, first);
  }
  prune(view.rows, new Set(groups.map((g) => g.name)));
  prune(view.listeners, new Set(listeners.map((l) => l.name)));

  let visible = 0;
  groups.forEach((g, i) => {
    if (!view.rows.has(g.name)) view.rows.set(g.name, newRow(g.name));
    const row = view.rows.get(g.name);
    if ($('rows').children[i] !== row.node) $('rows').insertBefore(row.node, $('rows').children[i] ?? null);
    const collapsed = !view.filtering() && !isExpanded(g.name);
    const shown = shownOf(g, leading.get(g.name), collapsed);
    row.node.hidden = shown == null;
    if (shown == null) return;
    visible++;
    row.none.hidden = leading.get(g.name).length > 0;
    row.draw(g, shown, collapsed);
  });
  listeners.forEach((l) => {
    if (!view.listeners.has(l.name)) view.listeners.set(l.name, newListener(l.name));
    const card = view.listeners.get(l.name);
    card.draw(l);
    const place = view.rows.get(home.get(l.name))?.listeners;
    if (place && card.node.parentNode !== place) place.append(card.node);
  });
  $('empty').hidden = visible > 0;
  put($('empty'), groups.length === 0 ? 'There are no target groups.' : 'Nothing matches the filter.');
}

function prune(cards, names) {
  for (const [name, card] of cards) {
    if (names.has(name)) continue;
    card.node.remove();
    cards.delete(name);
  }
}

// drawEdges leads listeners to groups and groups to targets, wherever the layout
// has put them: side by side, or one below the other with the edges in the margin.
function drawEdges() {
  const origin = $('edges').getBoundingClientRect(), paths = [];
  const edge = (from, to, state, idle, rate) => {
    const a = from.getBoundingClientRect(), b = to.getBoundingClientRect();
    if (a.width === 0 || b.width === 0) return; // hidden
    let d;
    if (b.left >= a.right) {
      const x1 = a.right - origin.left, y1 = a.top + a.height / 2 - origin.top;
      const x2 = b.left - origin.left, y2 = b.top + b.height / 2 - origin.top, bend = (x2 - x1) / 2;
      d = `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}`;
    } else {
      const x1 = a.left + 11 - origin.left, y1 = (b.top > a.top ? a.bottom : a.top) - origin.top;
      d = `M${x1} ${y1}V${b.top + 18 - origin.top}H${b.left - origin.left}`;
    }
    const path = el('path', { d, class: `${toneOf(state)}${idle ? ' idle' : ''}` });
    // The busier the wider, up to what still looks like a line.
    path.style.strokeWidth = 1.5 + Math.min(2.5, Math.log10(1 + (rate ?? 0)) * 0.8);
    paths.push(path);
  };
  for (const l of known.status.listeners) {
    for (const f of l.forward) {
      const row = view.rows.get(f.target_group);
      if (row) edge(view.listeners.get(l.name).node, row.card, 'unused', f.weight === 0, known.listenerRates[l.name]?.[1]);
    }
  }
  for (const g of known.status.target_groups) {
    const row = view.rows.get(g.name);
    g.targets.forEach((t, i) => {
      const target = row.targets.get(targetName(t));
      if (target) edge(row.card, target.node, t.state, t.effective_weight === 0, known.rates[g.name]?.[i]?.[1]);
    });
    if (!row.more.hidden) edge(row.card, row.more, 'unused', true, 0);
  }
  $('edges').replaceChildren(...paths);
}

// ---- around it ----

function drawSummary() {
  const { apply, dataplane, listeners, target_groups: groups } = known.status;
  const targets = groups.flatMap((g) => g.targets);
  const held = apply.held ? `in force as of ${age(now() - Date.parse(apply.converged_at))} ago` : 'not in force';
  put($('summary'), `${dataplane} · configuration ${apply.generation}, ${held} · ` +
    `${listeners.length} listeners, ${groups.length} target groups, ${targets.length} targets`);
  const bad = targets.filter((t) => t.state.startsWith('unhealthy')).length, open = groups.filter((g) => g.fail_open).length;
  document.title = [open && `${open} FAIL OPEN`, bad && `${bad} unhealthy`, 'nlb'].filter(Boolean).join(' · ');
  drawTally(targets);
}

function drawTally(targets) {
  const counts = new Map(counted(targets));
  for (const state of view.only) if (!counts.has(state)) counts.set(state, 0);
  for (const state of states) {
    let button = $('tally').querySelector(`[data-state="${state}"]`);
    if (!button) {
      const words = el('span');
      button = el('button', { type: 'button', 'data-state': state, class: toneOf(state) }, el('span', { class: 'state' }, stateIcon(state), words));
      button.addEventListener('click', () => {
        if (!view.only.delete(state)) view.only.add(state);
        redraw();
      });
      $('tally').append(button);
    }
    button.hidden = !counts.has(state);
    set(button, 'aria-pressed', String(view.only.has(state)));
    put(button.querySelector('.state > span'), `${counts.get(state) ?? 0} ${state}`);
  }
}

let silence = ''; // why there is nothing new

function drawAlerts() {
  const words = [];
  if (silence) words.push(silence);
  if (known.status) {
    const { apply, reload, conntrack, target_groups: groups } = known.status;
    if (!reload.success) words.push(`The last reload failed, the former configuration stays in force: ${reload.error}`);
    if (!apply.held) words.push(`The kernel does not hold this configuration: ${apply.error}`);
    else if (apply.error) words.push(`In force, by what was known before: ${apply.error}`);
    if (apply.counters_error) words.push(`Some or all counters are missing: ${apply.counters_error}`);
    if (conntrack?.alarm) words.push(`The table of flows is almost full, and then new flows are dropped: ${scaled(conntrack.count).join('')} of ${scaled(conntrack.max).join('')}`);
    for (const g of groups) {
      if (g.fail_open) words.push(`FAIL OPEN: too few targets of ${g.name} are healthy, new flows go to all of them (${countWords(g.targets)})`);
    }
  }
  // Only what differs, or a screen reader would read all of it again.
  words.forEach((text, i) => {
    const line = $('alerts').children[i] ?? $('alerts').appendChild(el('p', { class: 'alert' }));
    put(line, text);
  });
  while ($('alerts').children.length > words.length) $('alerts').lastChild.remove();
}

function drawTotals() {
  const totals = Object.entries(known.status.totals).filter(([, n]) => n > 0).sort();
  const cells = totals.flatMap(([name, n]) => [el('dt', { class: 'mono' }, name), el('dd', {}, n.toLocaleString('en'))]);
  $('totals').replaceChildren(...(cells.length ? cells : [el('dt', { class: 'none' }, 'nothing')]));
}

function draw() {
  if (!known.status) return;
  drawAlerts();
  drawSummary();
  drawRows();
  drawEdges();
  drawTotals();
}

// redraw is for what the reader asked to see.
function redraw() {
  draw();
  if (known.status && unrecalled.size > 0) recallAll();
}

// ---- changes ----

function standing(status) {
  const by = new Map();
  for (const g of status?.target_groups ?? []) {
    by.set(`${g.name}: fail open`, g.fail_open ? 'begins' : 'is over');
    for (const t of g.targets) by.set(`${g.name} ${targetName(t)}`, t.reason ? `${t.state} (${t.reason})` : t.state);
  }
  return by;
}

function tellChanges(before, after) {
  const lines = [];
  for (const [name, is] of after) if (before.has(name) ? before.get(name) !== is : !name.endsWith(': fail open') || is === 'begins') lines.push(`${name} ${is}`);
  for (const name of before.keys()) if (!after.has(name) && !name.endsWith(': fail open')) lines.push(`${name} gone`);
  if (lines.length === 0) return;
  $('changes').querySelector('.none')?.remove();
  const time = new Date(known.at).toLocaleTimeString();
  for (const line of lines.slice(0, remembered)) $('changes').prepend(el('li', {}, el('span', { class: 'muted' }, `${time} `), line));
  while ($('changes').children.length > remembered) $('changes').lastChild.remove();
  put($('announcement'), lines.length > 3 ? `${lines.length} changes, the first: ${lines[0]}` : lines.join('; '));
}

// ---- events ----

function rememberRates() {
  for (const [name, point] of Object.entries(known.listenerRates)) remember(`l ${name}`, known.at, point[1]);
  for (const g of known.status.target_groups) {
    remember(`g ${g.name}`, known.at, sum(known.rates[g.name] ?? [])[1]);
    const row = view.rows.get(g.name);
    g.targets.forEach((t, i) => {
      if (row?.targets.has(targetName(t))) remember(`t ${g.name} ${targetName(t)}`, known.at, known.rates[g.name]?.[i]?.[1] ?? null);
    });
  }
}

function take(e, apply) {
  const before = known.status && standing(known.status);
  apply(e);
  known.at = Date.parse(e.at);
  known.skew = known.at - Date.now();
  known.listenerRates = e.listener_rates;
  heard();
  if (before) tellChanges(before, standing(known.status));
  rememberRates();
  draw();
  if (e.status || unrecalled.size > 0) recallAll();
}

// takeStatus begins anew: it is the first event, or some were missed.
function takeStatus(e) {
  known.status = e.status;
  known.rates = e.rates;
  series.clear();
  for (const [name, row] of view.rows) if (row.targets.size > 0) unrecalled.add(name);
}

function takeChange(e) {
  const { at, listener_rates, rates, target_groups: groups, ...others } = e;
  const changed = new Map(groups.map((g) => [g.name, g]));
  const { dataplane, listeners, target_groups: former } = known.status;
  known.status = { ...others, dataplane, listeners, target_groups: former.map((g) => changed.get(g.name) ?? g) };
  Object.assign(known.rates, rates);
}

let stream, watchdog, retry;

function say(state, words) {
  set($('live'), 'data-state', state);
  put($('live'), words);
}

function heard() {
  silence = '';
  say('live', 'live');
  clearTimeout(watchdog);
  watchdog = setTimeout(() => lost('The daemon has said nothing for a while: what is shown may be out of date.'), silenceMs);
}

function lost(why) {
  say('lost', 'not live');
  silence = why;
  drawAlerts();
}

function connect() {
  disconnect();
  stream = new EventSource('api/v1/stream');
  stream.addEventListener('status', (e) => take(JSON.parse(e.data), takeStatus));
  stream.addEventListener('change', (e) => take(JSON.parse(e.data), takeChange));
  stream.addEventListener('failure', (e) => lost(`The daemon has nothing to tell: ${JSON.parse(e.data).error}`));
  stream.addEventListener('error', () => {
    lost('The connection to the daemon is lost; trying again. The kernel goes on forwarding without it.');
    // Refused, since too many watch, and not to be tried again by itself.
    if (stream.readyState === EventSource.CLOSED) retry = setTimeout(connect, retryMs);
  });
}

function disconnect() {
  clearTimeout(retry);
  clearTimeout(watchdog);
  stream?.close();
}

// Nobody watches a hidden page: it costs the daemon nothing. Browsers also have
// six connections to a host for all their pages, and a stream takes one.
function follow() {
  if (document.hidden) {
    disconnect();
    say('waiting', 'paused');
  } else {
    connect();
  }
}

$('tools').addEventListener('submit', (e) => e.preventDefault());
$('query').addEventListener('input', () => { view.query = $('query').value.trim().toLowerCase(); redraw(); });
for (const [id, is] of [['expand', true], ['collapse', false]]) {
  $(id).addEventListener('click', () => {
    view.expandAll = is;
    view.expanded.clear();
    redraw();
  });
}
document.addEventListener('visibilitychange', follow);
new ResizeObserver(() => { if (known.status) drawEdges(); }).observe($('topology'));
setInterval(() => {
  if (!known.status) return;
  for (const row of view.rows.values()) for (const t of row.targets.values()) t.tick();
  drawSummary();
}, 1000);
follow();
