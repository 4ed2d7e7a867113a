// The moving part of the page. It holds ids only: which conversation each tab shows. Truth is on the server, and comes
// over one WebSocket (modules/live.py). All HTML in the frames was made and made safe by modules/render.py.
(() => {
  'use strict';
  const shown = load('shown'); // preset -> conversation id
  const busy = {}; // conversation id -> true while it is being answered
  const trays = {}; // preset -> pictures to send [{id, url}]
  const panels = { system: ['system', 'bench', 'measured'], models: ['downloads', 'models', 'shelf'] }; // tab -> the parts of it that the server draws
  let socket = null, current = '', tries = 0, ref = 0;
  const pending = {}; // ref -> what to give back to the person if it could not be sent
  const $ = (selector, root) => (root || document).querySelector(selector);
  const $$ = (selector, root) => [...(root || document).querySelectorAll(selector)];
  const logOf = preset => $(`#chat-${preset} .log`);
  const boxOf = preset => $(`#message-${preset} textarea, textarea#message-${preset}`);
  const presets = () => $$('.log[data-preset]').map(log => log.dataset.preset);

  function load(name) { try { return JSON.parse(sessionStorage.getItem('turntable.' + name)) || {}; } catch { return {}; } }
  function save(name, value) { try { sessionStorage.setItem('turntable.' + name, JSON.stringify(value)); } catch { /* private mode */ } }
  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name === 'html') element.innerHTML = value; else if (value !== null && value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }
  function tell(message) {
    if (socket && socket.readyState === 1) { socket.send(JSON.stringify(message)); return true; }
    return false;
  }

  // The connection ---------------------------------------------------------------------
  function connect() {
    socket = new WebSocket((location.protocol === 'https:' ? 'wss://' : 'ws://') + location.host + '/live');
    socket.onopen = () => { tries = 0; document.body.classList.remove('offline'); document.body.classList.add('ready'); presets().forEach(open); draw(current); };
    socket.onmessage = event => take(JSON.parse(event.data));
    socket.onclose = () => {
      document.body.classList.add('offline');
      document.dispatchEvent(new Event('turntable-closed'));
      $('#status-model').textContent = 'Connection lost, trying again …';
      setTimeout(connect, Math.min(4000, 250 * 2 ** tries++));
    };
  }
  function draw(tab, off) { (panels[tab] || []).forEach(name => tell({ do: 'panel', name, off: !!off })); }
  function open(preset) { tell({ do: 'open', preset, chat: shown[preset] || null }); }
  function show(preset, chat) {
    shown[preset] = chat || null;
    save('shown', shown);
    if (preset === current) address();
  }
  function address() {
    history.replaceState(null, '', '#' + current + (shown[current] ? '/' + shown[current] : ''));
    $$('#chat-list .conversation').forEach(row => row.classList.toggle('on', row.dataset.chat === shown[current]));
  }

  const handlers = {
    panel(f) {
      const place = $(`#${f.name}-page`);
      if (!place) return;
      const fresh = document.createElement('template');
      fresh.innerHTML = f.html;
      morph(place, fresh.content);
    },
    status(f) {
      const bar = $('#status-bar'), dot = $('#status .dot'), name = $('#status-model');
      bar.hidden = !f.loading;
      dot.className = 'dot' + (f.loading ? ' loading' : f.models.length ? ' on' : '');
      if (f.loading) {
        const part = f.loading.total ? f.loading.done / f.loading.total : 0;
        bar.firstChild.style.width = (100 * part) + '%';
        name.textContent = `${words[f.loading.stage] || 'Loading'} ${f.loading.name} ${Math.round(100 * part)} % (${size(f.loading.done)} of ${size(f.loading.total)})`;
      } else name.textContent = f.models.length ? f.models[0].name : 'No model loaded';
      name.title = f.models.map(m => m.name).join('\n') + `\n${size(f.used)} of ${size(f.budget)} in use`;
    },
    chats(f) {
      const list = $('#chat-list');
      list.replaceChildren(...f.chats.map(chat => make('div', { class: 'conversation', 'data-chat': chat.id, 'data-preset': chat.preset },
        make('button', { type: 'button', class: 'open', title: chat.title || 'New conversation' }, make('span', {}, chat.title || 'New conversation'), make('small', {}, tabTitle(chat.preset))),
        make('button', { type: 'button', class: 'delete', 'aria-label': 'Delete ' + chat.title, title: 'Delete' }, '×'))));
      if (!f.chats.length) list.append(make('p', { class: 'none' }, 'Conversations appear here.'));
      address();
    },
    chat(f) {
      const log = logOf(f.preset);
      if (!log) return;
      show(f.preset, f.chat);
      log.replaceChildren();
      if (f.earlier) log.append(make('button', { type: 'button', class: 'earlier' }, 'Earlier messages'));
      f.messages.forEach(m => log.append(message(m)));
      if (f.live) begin(log, f.live);
      if (!f.messages.length) log.append(welcome(log));
      const last = f.messages[f.messages.length - 1];
      if (last && last.stats && f.preset === current) speed(last.stats);
      state(f.preset, !!f.live);
      down(log, true);
    },
    earlier(f) {
      const log = logOf(f.preset), button = $('.earlier', log), height = log.scrollHeight;
      const fresh = f.messages.map(message);
      if (button) button.after(...fresh);
      if (!f.earlier && button) button.remove();
      log.scrollTop += log.scrollHeight - height;
    },
    sent(f) { delete pending[f.ref]; show(f.preset, f.chat); },
    job(f) { logsOf(f.chat).forEach(log => patch(log, f)); },
    end(f) {
      logsOf(f.chat).forEach(log => {
        const old = $(`.bot[data-id="${f.message.id}"]`, log), near = atEnd(log);
        if (!old && f.streamed) return; // it ended before this conversation was drawn; that brings its text
        if (old) finish(old, f.message, !f.streamed); else log.append(message(f.message));
        state(log.dataset.preset, false);
        if (log.dataset.preset === current && f.message.stats) speed({ ...f.message.stats, context: f.message.context });
        if (near) down(log, true);
      });
    },
    error(f) {
      const back = pending[f.ref];
      if (back) {
        delete pending[f.ref];
        const box = boxOf(back.preset);
        if (box && !box.value) fill(box, back.text);
        back.images.forEach(picture => addToTray(back.preset, picture));
        state(back.preset, false);
      }
      if (f.code === 'chat_not_found' && f.preset) { show(f.preset, null); open(f.preset); return; }
      toast(f.message, f.hint);
    },
  };
  // A panel comes whole, once a second. What did not change is left alone, so that open details, the focus, a selection and a
  // button that asks whether one is sure survive.
  function morph(old, fresh) {
    let at = old.firstChild;
    const taken = new Set();
    for (const next of [...fresh.childNodes]) {
      const key = keyOf(next), same = key ? [...old.childNodes].find(n => keyOf(n) === key && !taken.has(n)) : at && !keyOf(at) && at.nodeName === next.nodeName ? at : null;
      if (!same) { taken.add(next); old.insertBefore(next, at); continue; }
      taken.add(same);
      if (same === at) at = at.nextSibling; else old.insertBefore(same, at);
      change(same, next);
    }
    while (at) { const gone = at; at = at.nextSibling; gone.remove(); }
  }
  function keyOf(node) { const key = node.nodeType === 1 && (node.id || node.dataset.key); return key ? node.nodeName + key : ''; }
  function change(old, next) {
    if (old.nodeType !== 1) { if (old.data !== next.data && !(getSelection().type === 'Range' && getSelection().containsNode(old, true))) old.data = next.data; return; }
    if (old.isEqualNode(next) || (old.classList.contains('sure') && old.dataset.action === next.dataset.action && !next.disabled)) return;
    for (const { name, value } of [...next.attributes]) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    for (const { name } of [...old.attributes]) if (!next.hasAttribute(name) && !(name === 'open' && old.nodeName === 'DETAILS')) old.removeAttribute(name);
    morph(old, next);
  }
  const words = { unloading: 'Unloading for', reading: 'Loading', warming: 'Warming up', restoring: 'Bringing back', starting: 'Starting' };
  function take(frame) { if (handlers[frame.t]) handlers[frame.t](frame); }
  function logsOf(chat) { return presets().filter(p => shown[p] === chat).map(logOf); }
  function tabTitle(preset) { const tab = document.getElementById('tab-' + preset); return tab ? tab.textContent : preset; }

  // Messages -----------------------------------------------------------------------------
  function message(m) {
    const row = make('article', { class: 'msg ' + (m.role === 'user' ? 'user' : 'bot'), 'data-id': m.id, 'data-seq': m.seq });
    if (m.role === 'user') {
      if (m.images.length) row.append(make('div', { class: 'shots' }, ...m.images.map(id => make('img', { src: '/image/' + id, alt: 'Picture that was sent', loading: 'lazy' }))));
      if (m.html) row.append(make('div', { class: 'body', html: m.html }));
      return row;
    }
    frameOf(row);
    if (m.state !== 'running') finish(row, m);
    return row;
  }
  function frameOf(row) {
    row.append(make('details', { class: 'think', hidden: '' }, make('summary', {}, 'Thought'), make('div', { class: 'body' })),
      make('div', { class: 'stage', hidden: '' }), make('div', { class: 'body text' }), make('footer', {}));
  }
  function finish(row, m, fresh = true) {
    row.classList.remove('live');
    $('.stage', row).hidden = true;
    const think = $('.think', row);
    if (fresh) { $('.text', row).innerHTML = m.html; $('.body', think).innerHTML = m.think; }
    [$('.text', row), $('.body', think)].forEach(long);
    think.hidden = !m.think;
    $('summary', think).textContent = 'Thought';
    const foot = $('footer', row);
    foot.replaceChildren();
    $$('.oops', row).forEach(old => old.remove());
    if (m.html) foot.append(make('button', { type: 'button', class: 'copy-all' }, 'Copy'));
    const marks = { stopped: 'Stopped', broken: 'Broken off', length: 'Cut at the limit of max tokens', running: '' };
    if (marks[m.state] && !(m.error && !m.html && !m.think)) foot.append(make('span', { class: 'mark ' + m.state }, marks[m.state]));
    if (m.note) foot.append(make('span', { class: 'note' }, m.note));
    if (m.stats && m.stats.completion) foot.append(make('span', { class: 'stats', title: m.variant }, `${m.variant} · ${m.stats.completion} tokens · ${Math.round(m.stats.tokens_per_second)} tok/s`));
    if (m.error) foot.before(make('div', { class: 'oops', role: 'alert' }, make('b', {}, m.error.message), ' ' + (m.error.hint || '')));
  }
  function begin(log, live) {
    let row = $(`.bot[data-id="${live.m}"]`, log);
    if (!row) { row = make('article', { class: 'msg bot', 'data-id': live.m }); frameOf(row); log.append(row); }
    row.classList.add('live');
    $('.text', row).innerHTML = live.text.join('');
    const think = $('.think', row);
    $('.body', think).innerHTML = live.reasoning.join('');
    think.hidden = !live.reasoning.length;
    stage(row, live.stage);
  }
  function patch(log, f) {
    const row = $(`.bot[data-id="${f.m}"]`, log);
    if (!row) return;
    const near = atEnd(log);
    row.classList.add('live');
    if (f.stage !== undefined) stage(row, f.stage);
    if (f.reasoning) { $('.think', row).hidden = false; $('.think summary', row).textContent = 'Thinking …'; apply($('.think .body', row), f.reasoning); }
    if (f.text) { apply($('.text', row), f.text); $('.think summary', row).textContent = 'Thought'; }
    if (log.dataset.preset === current) speed({ tokens_per_second: f.speed.tps, first_token_s: f.speed.first_s, used: f.speed.used, context: f.speed.context });
    if (near) down(log);
  }
  function apply(body, p) {
    if (p.append) { const open = $$('[data-open]', body).pop(); if (open) open.insertAdjacentHTML('beforeend', p.append); return; }
    while (body.children.length > p.keep) body.lastElementChild.remove();
    if (p.blocks.length) body.insertAdjacentHTML('beforeend', p.blocks.join(''));
    long(body);
  }
  function long(body) { body.classList.toggle('long', body.children.length > 40); }
  function stage(row, s) {
    const line = $('.stage', row);
    line.hidden = !s;
    if (!s) return;
    const part = s.total ? ` ${Math.round(100 * s.done / s.total)} %` : '';
    line.textContent = s.stage === 'queued' ? `Waiting for the model, place ${s.place} …` : s.stage === 'prompt' ? `Reading the prompt${part} …`
      : s.stage === 'starting' ? 'Starting …' : `${words[s.stage] || 'Loading'} the model${s.total ? part + ` of ${size(s.total)}` : ''} …`;
  }
  function speed(s) {
    const used = s.used !== undefined ? s.used : (s.prompt || 0) + (s.completion || 0);
    const parts = [];
    if (s.tokens_per_second) parts.push(`${Math.round(s.tokens_per_second)} tok/s`);
    if (s.first_token_s) parts.push(`first token ${s.first_token_s.toFixed(2)} s`);
    if (used) parts.push(`context ${used}${s.context ? '/' + s.context : ''}`);
    $('#status-speed').textContent = parts.join(' · ');
  }
  function size(bytes) { return bytes >= 1e9 ? (bytes / 1e9).toFixed(1) + ' GB' : bytes >= 1e6 ? (bytes / 1e6).toFixed(1) + ' MB' : Math.round(bytes / 1e3) + ' KB'; }
  function atEnd(log) { return log.scrollHeight - log.scrollTop - log.clientHeight < 80; }
  function down(log) { log.scrollTop = log.scrollHeight; }
  function welcome(log) {
    const about = JSON.parse(log.dataset.about), preset = log.dataset.preset;
    const box = make('div', { class: 'welcome' }, make('h2', {}, about.title), make('p', {}, about.about), make('p', { class: 'answers' }, about.answers));
    if (about.demo) {
      box.append(make('div', { class: 'demo' }, make('span', {}, 'A tiny bundled demo model answers here. It knows only a narrow field. '),
        make('button', { type: 'button', id: 'get-model-' + preset, class: 'get-model' }, 'Get a real model')));
    }
    box.append(make('div', { class: 'examples' }, ...about.examples.map(text => make('button', { type: 'button', class: 'example' }, text))));
    return box;
  }
  function toast(text, hint) {
    const note = make('div', { class: 'toast', role: 'alert' }, make('b', {}, text), ' ' + (hint || ''), make('button', { type: 'button', 'aria-label': 'Close' }, '×'));
    $('button', note).onclick = () => note.remove();
    document.body.append(note);
    setTimeout(() => note.remove(), 12000);
  }

  // What a person does --------------------------------------------------------------------
  function state(preset, running) {
    const composer = document.getElementById('composer-' + preset);
    if (composer) composer.classList.toggle('running', running);
    if (shown[preset]) busy[shown[preset]] = running;
  }
  function fill(box, text) { box.value = text; box.dispatchEvent(new Event('input', { bubbles: true })); }
  function send(preset, given) {
    const box = boxOf(preset), text = given === undefined ? box.value : given, images = trays[preset] || [];
    if (!text.trim() && !images.length) { box.focus(); return; }
    if ($(`#composer-${preset}.running`)) { toast('This conversation is still being answered.', 'Wait for the answer, or stop it.'); return; }
    const number = ++ref;
    if (!tell({ do: 'send', ref: number, preset, chat: shown[preset] || null, text, images: images.map(i => i.id) })) {
      toast('The server does not answer.', 'Your message is kept; send it again when the connection is back.');
      return;
    }
    pending[number] = { preset, text, images };
    if (given === undefined) fill(box, '');
    trays[preset] = [];
    drawTray(preset);
    state(preset, true);
    const log = logOf(preset), welcome = $('.welcome', log);
    if (welcome) welcome.remove();
    const own = make('div', { class: 'body plain' });
    own.textContent = text;
    log.append(make('article', { class: 'msg user' }, own)); // shown at once; the server's version replaces it
    down(log);
  }
  // Only this one works as long as it is shown; the others would be drawn anew for nothing.
  document.addEventListener('visibilitychange', () => { if (current === 'system') draw(current, document.hidden); });
  function go(name) {
    if (name !== current) draw(current, true);
    const button = document.getElementById(`panel-${name}-button`) || $$('#tabs > .tab-wrapper button[role=tab]').find(b => b.textContent.trim() === tabTitle(name));
    if (button) button.click();
    current = name;
    $$('#tabbar button').forEach(tab => { const on = tab.dataset.tab === name; tab.classList.toggle('on', on); tab.setAttribute('aria-selected', on); });
    const tab = document.getElementById('tab-' + name);
    if (tab) tab.scrollIntoView({ block: 'nearest', inline: 'nearest' });
    address();
    const log = logOf(name);
    if (log && !log.childNodes.length) open(name);
    draw(name);
    if (log) requestAnimationFrame(() => down(log));
  }
  function side(openIt) {
    document.body.classList.toggle('side-open', openIt === undefined ? !document.body.classList.contains('side-open') : openIt);
    $('#side-toggle').setAttribute('aria-expanded', document.body.classList.contains('side-open'));
  }
  document.addEventListener('click', event => {
    const at = selector => event.target.closest(selector);
    let hit;
    if (innerWidth < 900 && document.body.classList.contains('side-open') && !at('#side') && !at('#side-toggle')) side(false);
    if ((hit = at('#tabbar button'))) go(hit.dataset.tab);
    else if ((hit = at('button.send'))) send(hit.id.slice(5));
    else if ((hit = at('button.stop'))) { const chat = shown[hit.id.slice(5)]; if (chat) tell({ do: 'stop', chat }); }
    else if (at('#new-chat')) { const to = logOf(current) ? current : presets()[0]; go(to); show(to, null); open(to); boxOf(to).focus(); if (innerWidth < 900) side(false); }
    else if (at('#side-toggle')) side();
    else if ((hit = at('.conversation .open'))) {
      const row = hit.closest('.conversation'), preset = logOf(row.dataset.preset) ? row.dataset.preset : presets()[0];
      show(preset, row.dataset.chat); go(preset); open(preset); if (innerWidth < 900) side(false);
    } else if ((hit = at('.conversation .delete'))) {
      if (hit.classList.contains('sure')) tell({ do: 'delete', chat: hit.closest('.conversation').dataset.chat });
      else { hit.classList.add('sure'); hit.textContent = 'Delete?'; setTimeout(() => { hit.classList.remove('sure'); hit.textContent = '×'; }, 3000); }
    } else if ((hit = at('.earlier'))) {
      const log = hit.closest('.log'), first = $('.msg[data-seq]', log);
      tell({ do: 'earlier', preset: log.dataset.preset, chat: shown[log.dataset.preset], before: +first.dataset.seq });
    } else if ((hit = at('.example'))) {
      const preset = hit.closest('.log').dataset.preset, box = boxOf(preset);
      if (JSON.parse(hit.closest('.log').dataset.about).task === 'vision' && !(trays[preset] || []).length) { fill(box, hit.textContent); box.focus(); } else send(preset, hit.textContent);
    } else if ((hit = at('[data-panel]'))) {
      if (hit.dataset.sure && !hit.classList.contains('sure')) {
        const label = hit.textContent;
        hit.classList.add('sure'); hit.textContent = hit.dataset.sure;
        setTimeout(() => { hit.classList.remove('sure'); hit.textContent = label; }, 3000);
      } else tell({ do: 'act', panel: hit.dataset.panel, name: hit.dataset.name, action: hit.dataset.action });
    } else if (at('.get-model')) go('models');
    else if ((hit = at('[data-copy]'))) copy(hit, (hit.closest('.code') ? $('code', hit.closest('.code')) : $('code', hit.parentElement)).textContent);
    else if ((hit = at('.copy-all'))) copy(hit, $('.text', hit.closest('.msg')).innerText);
    else if ((hit = at('.camera'))) camera(presetOf(hit));
    else if ((hit = at('.tray button'))) { const preset = presetOf(hit); trays[preset] = trays[preset].filter(p => p.id !== hit.dataset.id); drawTray(preset); }
  });
  async function copy(button, text) {
    try { await navigator.clipboard.writeText(text); } catch {
      const area = make('textarea', {}); area.value = text; document.body.append(area); area.select(); document.execCommand('copy'); area.remove();
    }
    const label = button.textContent; button.textContent = 'Copied'; setTimeout(() => { button.textContent = label; }, 1200);
  }
  document.addEventListener('keydown', event => {
    const box = event.target.closest && event.target.closest('.message textarea, textarea');
    const home = box && event.target.closest('[id^=message-]');
    if (home && event.key === 'Enter' && !event.shiftKey && !event.isComposing) { event.preventDefault(); event.stopImmediatePropagation(); send(home.id.slice(8)); }
    if (event.key === 'Escape' && shown[current] && busy[shown[current]]) tell({ do: 'stop', chat: shown[current] });
  }, true);

  // Pictures --------------------------------------------------------------------------------
  function presetOf(element) { return element.closest('.chatwrap').querySelector('.log').dataset.preset; }
  function sees(preset) { return !!document.getElementById('image-' + preset); }
  async function upload(preset, files) {
    for (const file of files) {
      if (file.size > 20e6) { toast(`${file.name} has more than 20 MB.`, 'Make the picture smaller.'); continue; }
      try {
        const response = await fetch('/upload', { method: 'POST', body: file, headers: { 'Content-Type': 'application/octet-stream' } });
        const answer = await response.json();
        if (answer.error) toast(answer.error.message, answer.error.hint); else addToTray(preset, { id: answer.id });
      } catch { toast('The picture could not be sent to the server.', 'Try again.'); }
    }
  }
  function addToTray(preset, picture) { trays[preset] = [...(trays[preset] || []).filter(p => p.id !== picture.id), picture]; drawTray(preset); }
  function drawTray(preset) {
    const tray = $(`#image-${preset} .tray`);
    if (tray) tray.replaceChildren(...(trays[preset] || []).map(p => make('span', { class: 'shot' }, make('img', { src: '/image/' + p.id, alt: 'Picture to send' }), make('button', { type: 'button', 'data-id': p.id, 'aria-label': 'Remove picture' }, '×'))));
  }
  document.addEventListener('change', event => {
    if (event.target.matches('.pictures input[type=file]')) { upload(presetOf(event.target), [...event.target.files]); event.target.value = ''; }
  });
  document.addEventListener('paste', event => {
    const files = [...(event.clipboardData ? event.clipboardData.files : [])];
    if (files.length && sees(current)) { event.preventDefault(); upload(current, files); }
  });
  document.addEventListener('dragover', event => { if (sees(current)) { event.preventDefault(); document.body.classList.add('dropping'); } });
  document.addEventListener('dragleave', event => { if (!event.relatedTarget) document.body.classList.remove('dropping'); });
  document.addEventListener('drop', event => {
    document.body.classList.remove('dropping');
    if (event.dataTransfer.files.length) { event.preventDefault(); if (sees(current)) upload(current, [...event.dataTransfer.files]); }
  });
  async function camera(preset) {
    let stream;
    try { stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: 'environment' } }); } catch {
      toast('No camera can be used here.', 'Browsers give it only on localhost or over https, and only when allowed. Add a picture instead.'); return;
    }
    const video = make('video', { autoplay: '', playsinline: '', muted: '' }), shoot = make('button', { type: 'button', class: 'shoot' }, 'Take picture'), cancel = make('button', { type: 'button' }, 'Cancel');
    const dialog = make('dialog', { class: 'camera-dialog' }, video, make('div', {}, shoot, cancel));
    const end = () => { stream.getTracks().forEach(t => t.stop()); dialog.remove(); };
    video.srcObject = stream;
    cancel.onclick = end; dialog.oncancel = end;
    shoot.onclick = () => {
      const canvas = make('canvas', { width: video.videoWidth, height: video.videoHeight });
      canvas.getContext('2d').drawImage(video, 0, 0);
      canvas.toBlob(blob => { end(); upload(preset, [new File([blob], 'camera.jpg', { type: 'image/jpeg' })]); }, 'image/jpeg', 0.9);
    };
    document.body.append(dialog); dialog.showModal();
  }

  Object.assign(window.turntable, { page: { handlers, tell, toast, $, $$ } }); // for models.js

  // Start: gradio builds the page after this script was read ---------------------------------
  const wait = setInterval(() => {
    if (!$('#tabbar') || !presets().length || !presets().every(boxOf)) return;
    clearInterval(wait);
    const [preset, chat] = decodeURIComponent(location.hash.slice(1)).split('/');
    if (preset && chat) shown[preset] = chat;
    presets().forEach(p => { const log = logOf(p); if (!log.childNodes.length) log.append(welcome(log)); });
    const wanted = [preset, (window.turntable || {}).preset, presets()[0]].find(p => p && document.getElementById('tab-' + p));
    go(wanted);
    connect();
    // Gradio may draw a panel once more while it settles, which empties its log.
    let left = 20;
    const settle = setInterval(() => { presets().forEach(p => { if (!logOf(p).childNodes.length) open(p); }); if (!--left) clearInterval(settle); }, 250);
  }, 30);
})();
