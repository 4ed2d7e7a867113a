// The Models page: asking for other machines, sorting, filtering, the plan of one model. Loaded after page.js.
(() => {
  'use strict';
  const { handlers, tell, toast, $, $$ } = window.turntable.page;
  const waiting = {}; // ref -> what to do with the answer
  let number = 0, machine = 'here', sorted = null, planned = null, asking = false, again = false;

  function ask(to, said, done, failed) {
    const ref = 'm' + ++number;
    waiting[ref] = { done, failed };
    if (!tell({ do: 'ask', to, ref, ...said })) { delete waiting[ref]; if (failed) failed({ message: 'The connection is lost.', hint: '' }); }
  }
  document.addEventListener('turntable-closed', () => { // what was asked of the old connection is never answered
    for (const ref of Object.keys(waiting)) {
      const { failed } = waiting[ref];
      delete waiting[ref];
      if (failed) failed({ message: 'The connection was lost.', hint: 'Try again in a moment.' });
    }
  });
  handlers.told = f => { const wait = waiting[f.ref]; delete waiting[f.ref]; if (wait) wait.done(f); };
  const plainError = handlers.error;
  handlers.error = f => {
    const wait = waiting[f.ref];
    if (!wait) return plainError(f);
    delete waiting[f.ref];
    if (wait.failed) wait.failed(f); else toast(f.message, f.hint);
  };

  // The list ------------------------------------------------------------------------------
  // Which button has the focus, so that it can have it again after the list was drawn anew.
  function focused() {
    const button = document.activeElement, region = button && button.closest('#models-page, #models-table, #shelf-page');
    if (!region || button.nodeName !== 'BUTTON') return null;
    const is = ['plan', 'sort', 'name', 'action'].filter(name => button.dataset[name] !== undefined);
    return '#' + region.id + ' button' + is.map(name => `[data-${name}="${CSS.escape(button.dataset[name])}"]`).join('');
  }
  function focus(selector, otherwise) {
    if (!selector || (document.activeElement && document.activeElement !== document.body)) return;
    const button = $(selector) || (otherwise && $(otherwise));
    if (button) button.focus({ preventScroll: true });
  }
  function draw(text) { // two parts: between them are the fields, which stay
    const was = focused();
    const box = document.createElement('div');
    box.innerHTML = text;
    $('#models-page').replaceChildren(...box.firstChild.childNodes);
    $('#models-table').replaceChildren(...box.lastChild.childNodes);
    sort(); filter();
    focus(was);
  }
  const plainPanel = handlers.panel;
  handlers.panel = f => {
    if (f.name === 'shelf') { const was = focused(); plainPanel(f); return focus(was, '#shelf-page [data-action=undo]'); }
    if (f.name !== 'models') return plainPanel(f);
    if (machine === 'here') draw(f.html); else judge();
  };
  function judge() {
    const wanted = machine;
    ask('models', { place: wanted }, f => { if (machine === wanted) draw(f.html); });
  }
  function value(row, by) { const text = row.dataset[by]; return text === '' || isNaN(text) ? text : +text; }
  const most = new Set(['bpw', 'context', 'speed', 'spare']); // the largest is what people look for
  function sort() {
    const body = $('.variants tbody');
    if (!body || !sorted) return;
    const sign = sorted.down ? -1 : 1;
    const rows = $$('tr', body).sort((a, b) => {
      const x = value(a, sorted.by), y = value(b, sorted.by);
      return sign * (typeof x === 'number' && typeof y === 'number' ? x - y : String(x).localeCompare(String(y)));
    });
    body.append(...rows);
    $$('.variants th').forEach(head => {
      const button = $('button', head), on = button && button.dataset.sort === sorted.by;
      head.setAttribute('aria-sort', on ? (sorted.down ? 'descending' : 'ascending') : 'none');
    });
  }
  function filter() {
    const words = $('#filter-text').value.toLowerCase().split(/\s+/).filter(Boolean), task = $('#filter-task').value;
    const fits = $('#filter-fits').checked, here = $('#filter-here').checked;
    let left = 0;
    $$('.variants tbody tr').forEach(row => {
      const d = row.dataset;
      const on = words.every(word => d.text.includes(word)) && (!task || d.preset === task) && (!fits || d.fits === '1') && (!here || d.here === '1');
      row.hidden = !on;
      left += on;
    });
    const nothing = $('#models-table .nothing');
    if (nothing) nothing.hidden = left > 0;
  }

  // The plan of one model -----------------------------------------------------------------
  function openPlan(of) {
    planned = { of, form: null };
    const dialog = $('#plan');
    $('#plan-title').textContent = '…';
    $('#plan-about').textContent = '';
    $('#plan-result').innerHTML = '';
    $('#plan-form').hidden = true;
    if (!dialog.open) dialog.showModal();
    plan({});
  }
  function plan(moved) { // one question at a time; while it is under way only the latest position counts
    if (!planned) return;
    Object.assign(planned, moved);
    if (asking) { again = true; return; }
    asking = true;
    const { of, context, cache, bits } = planned;
    const end = next => { asking = false; if (again) { again = false; plan({}); } else next(); };
    ask('plan', { of, place: machine, context, cache, bits }, f => end(() => { if (planned && planned.of === of) show(f); }), f => end(() => {
      $('#plan-result').innerHTML = '';
      const text = document.createElement('p');
      text.className = 'oops'; text.textContent = `${f.message} ${f.hint || ''}`;
      $('#plan-result').append(text);
    }));
  }
  function show(f) {
    const first = !planned.form, form = planned.form = f.form;
    $('#plan-title').textContent = f.title;
    $('#plan-about').textContent = f.about;
    const context = $('#plan-context'), bits = $('#plan-bits'), cache = $('#plan-cache');
    if (first) {
      cache.replaceChildren(...form.caches.map(mode => new Option(mode, mode)));
      bits.max = form.bits.length - 1;
      bits.parentElement.hidden = form.bits.length < 2;
      $('#plan-form').hidden = false;
    }
    context.max = form.contexts.length - 1;
    // A slider under the finger stays where it is; the answer to its latest position is on its way.
    if (document.activeElement !== context || first) context.value = form.contexts.indexOf(form.context);
    if (document.activeElement !== bits || first) bits.value = Math.max(0, form.bits.findIndex(b => b[0] === form.bit));
    cache.value = form.cache;
    labels();
    const open = $('#plan-result details') && $('#plan-result details').open;
    $('#plan-result').innerHTML = f.html;
    if (open) $('#plan-result details').open = true;
  }
  function labels() {
    const form = planned.form, context = $('#plan-context'), bits = $('#plan-bits');
    const tokens = form.contexts[+context.value], at = form.bits[+bits.value];
    $('output', context.parentElement).textContent = tokens.toLocaleString('en') + ' tokens';
    context.setAttribute('aria-valuetext', tokens + ' tokens');
    $('output', bits.parentElement).textContent = at[1];
    bits.setAttribute('aria-valuetext', at[1]);
  }

  // A repository that somebody typed in ------------------------------------------------------
  function look(repo, file, projector) {
    const place = $('#look-page');
    place.innerHTML = '<p>Asking …</p>';
    ask('look', { repo, file, projector }, f => { place.innerHTML = f.html; if (f.of) openPlan(f.of); }, f => {
      place.innerHTML = '';
      const text = document.createElement('p');
      text.className = 'oops'; text.setAttribute('role', 'alert'); text.textContent = `${f.message} ${f.hint || ''}`;
      place.append(text);
    });
  }

  function token(said) {
    const says = $('#token-says');
    ask('token', said, f => { says.textContent = f.html; }, f => { says.textContent = `${f.message} ${f.hint || ''}`; });
  }
  document.addEventListener('toggle', event => { if (event.target.id === 'access' && event.target.open) token({}); }, true);
  document.addEventListener('submit', event => {
    if (event.target.id === 'token') {
      event.preventDefault();
      const field = event.target.elements.token, given = field.value.trim();
      field.value = '';
      if (given) token({ token: given });
    }
    if (event.target.id !== 'look') return;
    event.preventDefault();
    const repo = $('#look-repo').value.trim().replace(/^https?:\/\/[^/]+\//, '').replace(/\/tree\//, '@').replace(/\/+$/, '');
    if (repo) look(repo);
  });
  document.addEventListener('click', event => {
    const at = selector => event.target.closest(selector);
    let hit;
    if ((hit = at('[data-sort]'))) {
      const by = hit.dataset.sort;
      sorted = { by, down: sorted && sorted.by === by ? !sorted.down : most.has(by) };
      sort();
    } else if ((hit = at('[data-plan]'))) openPlan(hit.dataset.plan);
    else if ((hit = at('[data-look]'))) { const with_ = $('#look-projector'); look(hit.dataset.look, hit.dataset.file, hit.dataset.file && with_ ? with_.value : ''); }
    else if ((hit = at('[data-use]'))) {
      const { use, value } = hit.dataset;
      if (document.activeElement) document.activeElement.blur();
      plan({ [use]: use === 'context' ? +value : value });
    } else if (at('#plan .close') || event.target.id === 'plan') $('#plan').close();
    else if (at('#token-forget')) token({ forget: true });
    else if (at('#plan [data-action]')) setTimeout(() => $('#plan').close(), 150); // the download is shown on the page
  });
  document.addEventListener('input', event => {
    const id = event.target.id;
    if (id === 'filter-text') filter();
    else if (id === 'plan-context') { labels(); plan({ context: planned.form.contexts[+event.target.value] }); }
    else if (id === 'plan-bits') { labels(); plan({ bits: planned.form.bits[+event.target.value][0] }); }
  });
  document.addEventListener('change', event => {
    const id = event.target.id;
    if (id === 'place') { machine = event.target.value; judge(); }
    else if (id === 'filter-task' || id === 'filter-fits' || id === 'filter-here') filter();
    else if (id === 'plan-cache') plan({ cache: event.target.value });
  });
})();
