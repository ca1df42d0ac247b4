// Runs terminals of xterm.js for berth's tests. Requests on standard input are frames: an operation (1 byte), a terminal's
// number (4, big endian), a length (4) and that much payload. States and dumps are answered in order, each with its length first (4).
//
// Public API where there is one; what a terminal remembers beyond its cells can only be read from its insides, so the version is pinned.
'use strict';
const fs = require('fs');
const { Terminal } = require('@xterm/headless');
const { Unicode11Addon } = require('@xterm/addon-unicode11');

// Where there is a Buffer this addon (0.4.0) unpacks its tables from the wrong place and takes every emoji for narrow; as in a browser it is right.
const { Buffer: hidden } = globalThis;
globalThis.Buffer = undefined;
const { UnicodeGraphemesAddon } = require('@xterm/addon-unicode-graphemes');
globalThis.Buffer = hidden;

const terminals = new Map();

// mend makes copying cells, which wraps lines anew, copy the clusters of the cells that are copied: xterm.js 6.0.0 copies those of all later
// columns too, over others that are there.
function mend(line) {
  const copy = line.copyCellsFrom;
  if (copy.mended) return;
  line.copyCellsFrom = function (src, srcCol, destCol, length, inReverse) {
    const all = src._combined, copied = Object.entries(all).filter(([x]) => x >= srcCol && x < srcCol + length);
    src._combined = {};
    copy.call(this, src, srcCol, destCol, length, inReverse);
    src._combined = all;
    for (const [x, cluster] of copied) this._combined[x - srcCol + destCol] = cluster;
  };
  line.copyCellsFrom.mended = true;
}

function create({ rows, cols, scrollback, unicode, reflowCursorLine }) {
  const t = new Terminal({ rows, cols, scrollback, reflowCursorLine, allowProposedApi: true, logLevel: 'off', windowOptions: { pushTitle: true, popTitle: true } });
  if (unicode === '11') t.loadAddon(new Unicode11Addon());
  if (unicode === '15-graphemes') t.loadAddon(new UnicodeGraphemesAddon());
  t.unicode.activeVersion = unicode;
  const seen = { term: t, title: '', colors: {}, utf8: new TextDecoder('utf-8', { ignoreBOM: true }) };
  t.onTitleChange(title => { seen.title = title; });
  const colors = event => {
    for (const { type, index, color } of event) {
      if (type === 1) seen.colors[index] = color.join(',');
      else if (type === 2 && index === undefined) for (const k of Object.keys(seen.colors)) { if (k < 256) delete seen.colors[k]; }
      else if (type === 2) delete seen.colors[index];
    }
  };
  t._core._inputHandler.onColor(colors);
  const handler = t._core._inputHandler, save = handler.saveCursor;
  handler.saveCursor = function () {
    t._core.buffer.wasSaved = true;
    return save.call(this);
  };
  mend(Object.getPrototypeOf(t._core.buffer.lines.get(0)));
  return seen;
}

// Cells are three words: content, foreground, background; flags of rare attributes point into _extendedAttrs.
const COMBINED = 0x200000, EXTENDED = 0x10000000;

function link(core, id) {
  if (!id) return '';
  const data = core._oscLinkService.getLinkData(id);
  return data ? data.uri : '';
}

// rare writes a cell's underline style and colour and its link, or nothing.
function rare(core, ext) {
  if (!ext) return '';
  const style = ext.underlineStyle > 1 ? ext.underlineStyle : 0; // 1 is the plain flag
  const color = ext.underlineColor & 0x3ffffff ? ext.underlineColor & 0x3ffffff : 0;
  const uri = link(core, ext.urlId);
  return style || color || uri ? `${style}/${color.toString(16)}/${uri}` : '';
}

class Digest {
  constructor() { this.a = 0x811c9dc5; this.b = 0x9e3779b9; }
  word(w) {
    this.a = Math.imul(this.a ^ w, 0x01000193) + (this.b >>> 15) | 0;
    this.b = Math.imul(this.b ^ w ^ (this.a >>> 13), 0x85ebca6b) | 0;
  }
  text(s) { for (let i = 0; i < s.length; i++) this.word(s.charCodeAt(i)); this.word(-1); }
  toString() { return (this.a >>> 0).toString(16).padStart(8, '0') + (this.b >>> 0).toString(16).padStart(8, '0'); }
}

// A cell nothing was printed into looks like a space; that is all that is made equal.
const SPACE = 32 | 1 << 22;
const content = w => (w & 0x1fffff) === 0 && !(w & COMBINED) && w >>> 22 !== 0 ? SPACE : w;

// shown takes a wide character that a narrower window cut in two for a blank; xterm.js keeps it in its one column.
const shown = (w, last) => last && w >>> 22 === 2 ? SPACE : w;

// digestLine adds one line. The first line of all continues none.
function digestLine(core, d, b, at, cols) {
  const line = b.lines.get(at);
  const data = line._data;
  for (let x = 0; x < cols; x++) {
    const bg = data[3 * x + 2], w = shown(data[3 * x], x + 1 === cols);
    d.word(content(w));
    d.word(data[3 * x + 1]);
    d.word(bg & ~EXTENDED);
    if (w & COMBINED) d.text(line._combined[x]);
    if (bg & EXTENDED) {
      const r = rare(core, line._extendedAttrs[x]);
      if (r) d.text(r);
    }
  }
  d.word(line.isWrapped && at > 0 ? 1 : 0);
}

function textLine(core, b, at, cols) {
  const line = b.lines.get(at);
  let out = line.isWrapped && at > 0 ? '+' : ' ', last = '';
  const data = line._data;
  for (let x = 0; x < cols; x++) {
    const fg = data[3 * x + 1], bg = data[3 * x + 2], w = shown(data[3 * x], x + 1 === cols);
    const style = `${fg.toString(16)},${(bg & ~EXTENDED).toString(16)},${bg & EXTENDED ? rare(core, line._extendedAttrs[x]) : ''}`;
    if (style !== last && (style !== '0,0,' || last !== '')) { out += `{${style}}`; last = style; }
    if (w & COMBINED) out += `<${line._combined[x]}>`;
    else if (w & 0x1fffff) out += String.fromCodePoint(w & 0x1fffff);
    else if (w >>> 22) out += ' ';
  }
  if (last !== '' && last !== '0,0,') out += '{0,0,}';
  return out.trimEnd();
}

function charset(c) { return c ? Object.entries(c).slice(0, 3).join() : 'ascii'; }

// saved is what DECRC would restore. A resize moves even a cursor that never was saved; that is none.
function saved(core, b, attr) {
  const text = `${Math.max(0, b.savedY - b.ybase)},${Math.min(b.savedX, core.cols - 1)} ${attr(b.savedCurAttrData)} ${charset(b.savedCharset)}`;
  return b.wasSaved && text !== '0,0 0,0 ascii' ? text : 'none';
}

// facts is all that is not cells, as one line a fact.
function facts(seen) {
  const core = seen.term._core, b = core.buffer, pen = core._inputHandler._curAttrData, cs = core._charsetService;
  const { cursorBlink, cursorStyle, ...dec } = core.coreService.decPrivateModes;
  const attr = a => `${(a.fg >>> 0).toString(16)},${((a.bg & ~EXTENDED) >>> 0).toString(16)}`;
  return [
    `screen ${core.buffers.active === core.buffers.alt ? 'alternate' : 'main'}`,
    `cursor ${b.y},${b.x}`,
    `pen ${attr(pen)} ${rare(core, pen.extended)}`,
    `region ${b.scrollTop}-${b.scrollBottom}`,
    `saved ${saved(core, b, attr)}`,
    `charset ${cs.glevel} ${charset(cs.charset)} ${[0, 1, 2, 3].map(i => charset(cs._charsets[i])).join(' ')}`,
    `tabs ${Object.keys(b.tabs).filter(x => b.tabs[x] && x < core.cols).join()}`,
    `modes ${JSON.stringify(dec)} ${JSON.stringify(core.coreService.modes)} newline=${core.options.convertEol} hidden=${core.coreService.isCursorHidden}`,
    `mouse ${core.coreMouseService.activeProtocol} ${core.coreMouseService.activeEncoding}`,
    `cursor style ${cursorStyle} ${cursorBlink} ${core.options.cursorBlink}`,
    `title ${seen.title}`,
    `colors ${JSON.stringify(seen.colors)}`,
    `parser ${core._inputHandler._parser.currentState}`,
  ];
}

function screens(core) {
  const all = [['main', core.buffers.normal]];
  if (core.buffers.active === core.buffers.alt) all.push(['alternate', core.buffers.alt]);
  return all;
}

function state(seen) {
  const core = seen.term._core, told = new Digest(), cells = new Digest(), history = new Digest();
  for (const f of facts(seen)) told.text(f);
  for (const [, b] of screens(core)) {
    for (let y = 0; y < core.rows; y++) digestLine(core, cells, b, b.ybase + y, core.cols);
  }
  const b = core.buffers.normal;
  for (let y = 0; y < b.ybase; y++) digestLine(core, history, b, y, core.cols);
  history.word(b.ybase);
  return `${told} ${cells} ${history}`;
}

// part is the text of some rows of the screen that is shown, cut to some columns; wide characters that are cut are blanks.
function part(seen, { top, rows, cols }) {
  const core = seen.term._core, b = core.buffer, out = [];
  for (let y = top; y < top + rows; y++) out.push(textLine(core, b, b.ybase + y, Math.min(cols, core.cols)).slice(1));
  out.push(`cursor ${b.y - top},${Math.min(b.x, cols - 1)}`);
  return out.join('\n') + '\n';
}

// lines is the text of the scrollback with the lines put together that were wrapped.
function lines(seen) {
  const core = seen.term._core, b = core.buffers.normal, out = [];
  for (let y = 0; y < b.ybase; y++) {
    const line = b.lines.get(y), next = b.lines.get(y + 1);
    let end = line.getTrimmedLength();
    if (next?.isWrapped) { // a wide character that did not fit leaves the last column empty
      end = core.cols;
      if (next.getWidth(0) === 2 && line.getWidth(end - 1) === 1 && !line.hasContent(end - 1)) end--;
    }
    const text = line.translateToString(false, 0, end);
    if (line.isWrapped && y > 0) out[out.length - 1] += text; else out.push(text);
  }
  return out.map(l => l.trimEnd()).join('\n') + '\n';
}

function dump(seen) {
  const core = seen.term._core, out = facts(seen);
  for (const [name, b] of screens(core)) {
    for (let y = 0; y < core.rows; y++) out.push(`${name} ${y} ${textLine(core, b, b.ybase + y, core.cols)}`);
  }
  const b = core.buffers.normal;
  for (let y = 0; y < b.ybase; y++) out.push(`scrollback ${y - b.ybase} ${textLine(core, b, y, core.cols)}`);
  return out.join('\n') + '\n';
}

function answer(text) {
  const body = Buffer.from(text), head = Buffer.alloc(4);
  head.writeUInt32BE(body.length);
  const all = Buffer.concat([head, body]);
  for (let at = 0; at < all.length;) at += fs.writeSync(1, all, at);
}

function read(n) {
  const buf = Buffer.alloc(n);
  for (let at = 0; at < n;) {
    let got;
    try {
      got = fs.readSync(0, buf, at, n - at);
    } catch (e) {
      if (e.code === 'EAGAIN') continue;
      throw e;
    }
    if (got === 0) process.exit(0);
    at += got;
  }
  return buf;
}

for (;;) {
  const head = read(9), id = head.readUInt32BE(1), payload = read(head.readUInt32BE(5)), seen = terminals.get(id);
  switch (String.fromCharCode(head[0])) {
    case 'n': terminals.set(id, create(JSON.parse(payload))); break;
    // xterm.js 6.0.0 itself loses a rune that is written in pieces if one ends in the byte 0x80.
    case 'w': seen.term._core.writeSync(seen.utf8.decode(payload, { stream: true })); break;
    case 'r': { const { rows, cols } = JSON.parse(payload); seen.term.resize(cols, rows); break; }
    case 's': answer(state(seen)); break;
    case 'd': answer(dump(seen)); break;
    case 'p': answer(part(seen, JSON.parse(payload))); break;
    case 'l': answer(lines(seen)); break;
    case 'x': seen.term.dispose(); terminals.delete(id); break;
  }
}
