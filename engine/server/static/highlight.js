/** Colours for code: comments, texts, numbers and keywords, as far as one expression per kind of language can tell. */

const MOST = 20_000; // characters; longer code stays plain
const HASH = "#[^\\n]*";
const SLASHES = "\\/\\/[^\\n]*|\\/\\*[\\s\\S]*?(?:\\*\\/|$)";
const DASHES = "--[^\\n]*";
const DOUBLE = "\"(?:[^\"\\\\\\n]|\\\\.)*\"?";
const QUOTES = DOUBLE + "|'(?:[^'\\\\\\n]|\\\\.)*'?";
const LONG_QUOTES = "\"\"\"[\\s\\S]*?(?:\"\"\"|$)|'''[\\s\\S]*?(?:'''|$)|" + QUOTES;
const NUMBER = "\\b(?:0x[\\da-fA-F_]+|\\d[\\d_]*(?:\\.\\d+)?(?:[eE][+-]?\\d+)?)\\b";

const C = "auto bool break case catch char class const constexpr continue default delete do double else enum extern false final finally float for goto if import implements inline int interface long namespace new null nullptr override package private protected public return short signed sizeof static struct super switch template this throw true try typedef typename union unsigned using var virtual void volatile while";
const JS = "async await break case catch class const continue default delete do else export extends false finally for from function if import in instanceof interface let new null of return static super switch this throw true try type typeof undefined var void while yield";
const PYTHON = "False None True and as assert async await break case class continue def del elif else except finally for from global if import in is lambda match nonlocal not or pass raise return try while with yield";
const SHELL = "case do done echo elif else esac exit export fi for function if in local return set then until while";
const GO_RUST = "as async await break case chan const continue crate default defer dyn else enum extern false fallthrough fn for func go if impl import in interface let loop map match mod move mut nil package pub range ref return select self static struct super switch trait true type unsafe use var where while";
const SQL = "and as asc between by case create delete desc distinct drop else end exists from group having if in inner insert into is join key left like limit not null on or order outer primary right select set table then union update values when where";

const KINDS = [
  [["python", "py"], HASH, LONG_QUOTES, PYTHON],
  [["bash", "sh", "shell", "zsh", "make", "makefile", "dockerfile"], HASH, QUOTES, SHELL],
  [["yaml", "yml", "toml", "ini", "ruby", "rb"], HASH, QUOTES, "true false null begin class def do else elsif end if module nil require self unless yes no"],
  [["js", "javascript", "ts", "typescript", "jsx", "tsx"], SLASHES, `${QUOTES}|\`(?:[^\`\\\\]|\\\\.)*\`?`, JS],
  [["json", "jsonc"], SLASHES, QUOTES, "true false null"],
  [["c", "h", "cpp", "c++", "cc", "hpp", "java", "cs", "csharp", "cuda", "kotlin", "swift", "php"], SLASHES, QUOTES, C],
  [["go", "rust", "rs"], SLASHES, DOUBLE, GO_RUST],
  [["sql"], DASHES, QUOTES, SQL],
];
const EXPRESSIONS = new Map();
for (const [names, comment, text, words] of KINDS) {
  const keywords = `\\b(?:${words.replaceAll(" ", "|")})\\b`;
  const pattern = `(?<comment>${comment})|(?<text>${text})|(?<number>${NUMBER})|(?<keyword>${keywords})`;
  const expression = new RegExp(pattern, names[0] === "sql" ? "gi" : "g");
  for (const name of names) EXPRESSIONS.set(name, expression);
}

/** `code` as pieces [kind, text]; the kind is empty for what has no colour, as all of an unknown language. */
export function colour(code, language) {
  const expression = EXPRESSIONS.get(language.toLowerCase());
  if (!expression || code.length > MOST) return [["", code]];
  const pieces = [];
  let at = 0;
  for (const found of code.matchAll(expression)) {
    if (found.index > at) pieces.push(["", code.slice(at, found.index)]);
    const [kind] = Object.entries(found.groups).find(([, value]) => value !== undefined);
    pieces.push([kind, found[0]]);
    at = found.index + found[0].length;
  }
  if (at < code.length) pieces.push(["", code.slice(at)]);
  return pieces;
}
