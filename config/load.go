package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// An Error is one thing that is wrong with a configuration.
type Error struct {
	Path    string // of the key, such as upstreams[docker.io].endpoints[0]
	Line    int    // 0 when the key does not stand in the file
	Message string
	Excerpt string // of the file, with the place marked

	unknown bool // about a key, not about a value
}

func (e *Error) Error() string {
	var b strings.Builder
	if e.Line > 0 {
		fmt.Fprintf(&b, "line %d: ", e.Line)
	}
	if e.Path != "" {
		fmt.Fprintf(&b, "%s: ", e.Path)
	}
	b.WriteString(e.Message)
	if e.Excerpt != "" {
		b.WriteString("\n" + e.Excerpt)
	}
	return b.String()
}

// Errors is everything that is wrong, in the order of the file.
type Errors []*Error

func (es Errors) Error() string {
	lines := make([]string, len(es))
	for i, e := range es {
		lines[i] = e.Error()
	}
	return strings.Join(lines, "\n")
}

// A Check looks at what this package knows nothing of, and calls fail for what
// is wrong with it, with the path of the key.
type Check func(c *Config, fail func(path, message string))

// Load reads, completes and validates the configuration in the file path; ""
// is the empty configuration. What flags say goes into override, which is
// called before validation; check is part of it. Both may be nil. The error is an
// Errors if the file can be read.
func Load(path string, override func(*Config), check Check) (*Config, error) {
	var data []byte
	if path != "" {
		var err error
		if data, err = os.ReadFile(path); err != nil {
			return nil, fmt.Errorf("read configuration: %w", err)
		}
	}
	return Parse(data, override, check)
}

// Parse is Load of a file's content.
func Parse(data []byte, override func(*Config), check Check) (*Config, error) {
	c, d := decode(data, true)
	if c == nil {
		return nil, d.errs
	}
	if override != nil {
		override(c)
	}
	c.validate(d)
	return d.end(c, check)
}

// ParseAudit reads what a configuration says about the ledger, and the kinds of
// its upstreams, from anybody's text: no variable of the environment is put in
// and no file is looked at, and nothing else of it is checked.
func ParseAudit(data []byte, check Check) (*Config, error) {
	c, d := decode(data, false)
	if c == nil {
		return nil, d.errs
	}
	c.validateAudit(d)
	return d.end(c, check)
}

// decode reads a configuration and completes it. It is nil when it is no YAML.
func decode(data []byte, expand bool) (*Config, *decoder) {
	c := Default()
	data = bytes.TrimPrefix(data, []byte("\ufeff")) // some editors begin files with it
	d := &decoder{source: strings.Split(string(data), "\n"), tokens: make(map[string]*token.Token), expand: expand}
	tokens := lexer.Tokenize(string(data))
	begun := false
	for _, tok := range tokens {
		if tok.Type == token.DocumentHeaderType && begun {
			d.fail("", tok, "a configuration is one document")
			return nil, d
		}
		begun = begun || tok.Type != token.CommentType
	}
	file, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey()) // told by eachKey
	if err != nil {
		var ye yaml.Error
		if !errors.As(err, &ye) {
			d.errs = Errors{{Message: conceal(err.Error())}}
			return nil, d
		}
		d.fail("", ye.GetToken(), "%s", conceal(ye.GetMessage()))
		return nil, d
	}
	for _, doc := range file.Docs {
		if doc.Body != nil {
			d.decode(doc.Body, reflect.ValueOf(c).Elem(), "")
		}
	}
	c.complete()
	d.decoded = len(d.errs)
	return c, d
}

// end has check look at c too, and returns it, or all errors in the order of the
// file.
func (d *decoder) end(c *Config, check Check) (*Config, error) {
	if check != nil {
		check(c, func(path, message string) { d.fail(path, nil, "%s", message) })
	}
	if len(d.errs) == 0 {
		return c, nil
	}
	sort.SliceStable(d.errs, func(i, j int) bool { return d.errs[i].Line < d.errs[j].Line })
	return nil, d.errs
}

// A decoder fills the configuration from the file's syntax tree. It goes on
// after an error, so that all of them can be told at once.
type decoder struct {
	errs   Errors
	tokens map[string]*token.Token // where each path stands

	// decoded is how many of errs are about values that did not decode. Those
	// have their defaults: to complain of what follows would mislead.
	decoded int
	source  []string // lines of the file
	expand  bool     // put in variables of the environment
}

// isSpoiled tells whether path, or something it is part of, did not decode.
func (d *decoder) isSpoiled(path string) bool {
	return slices.ContainsFunc(d.errs[:d.decoded], func(e *Error) bool {
		rest, ok := strings.CutPrefix(path, e.Path)
		return ok && !e.unknown && e.Path != "" && (rest == "" || rest[0] == '.' || rest[0] == '[')
	})
}

// fail records an error at a path, whose place in the file is tok, or is looked
// up when tok is nil.
func (d *decoder) fail(path string, tok *token.Token, format string, args ...any) {
	if d.isSpoiled(path) {
		return
	}
	for at := path; tok == nil && at != ""; at = parent(at) {
		tok = d.tokens[at] // a key that is not there is missing from what it belongs to
	}
	e := &Error{Path: path, Message: fmt.Sprintf(format, args...)}
	if tok != nil {
		e.Line = tok.Position.Line
		e.Excerpt = d.excerpt(path, tok)
	}
	d.errs = append(d.errs, e)
}

// parent is the path of what the key at path belongs to.
func parent(path string) string {
	return path[:max(strings.LastIndexAny(path, ".["), 0)]
}

// excerpt shows the line of tok and marks the place, unless it may hold a
// secret. Only that line: the ones around it may hold one too.
func (d *decoder) excerpt(path string, tok *token.Token) string {
	n, column := tok.Position.Line, tok.Position.Column
	if n < 1 || n > len(d.source) || column < 1 || secretKey.MatchString(path) || strings.HasPrefix(path, "audit.publish") || strings.HasPrefix(path, "notify") {
		return ""
	}
	line := strings.TrimRight(d.source[n-1], "\r")
	shown := conceal(line)
	mark := ""
	if shown == line && column <= len(line)+1 {
		mark = fmt.Sprintf("\n%6s %s^", "", strings.Repeat(" ", column-1))
	}
	return fmt.Sprintf("%4d | %s%s", n, shown, mark)
}

var (
	secretKey   = regexp.MustCompile(`(?i)(pass|secret|token)[a-z]*$`)
	secretValue = regexp.MustCompile(`(?i)((?:pas|pwd|secret|token)[a-z]*["']?[ \t]*:[ \t]*)\S.*$`)
	userInfo    = regexp.MustCompile(`[^\s"'\[,]*@`)
)

// conceal takes out of a text what may be a secret in the wrong place.
func conceal(text string) string {
	return userInfo.ReplaceAllString(secretValue.ReplaceAllString(text, "${1}(concealed)"), "…@")
}

// scalar is a value that is written as one text.
type scalar interface{ parse(string) error }

func (d *decoder) decode(n ast.Node, v reflect.Value, path string) {
	d.tokens[path] = n.GetToken()
	if _, null := n.(*ast.NullNode); null {
		return // "key:" and nothing: the default
	}
	if s, ok := v.Addr().Interface().(scalar); ok {
		if text, ok := d.text(n, path, false); ok {
			if err := s.parse(text); err != nil {
				d.fail(path, n.GetToken(), "%v", err)
			}
		}
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		d.decode(n, v.Elem(), path)
	case reflect.Int:
		if text, ok := d.text(n, path, false); ok {
			i, err := strconv.ParseUint(text, 10, 31)
			if err != nil {
				d.fail(path, n.GetToken(), "%.50q is not a number such as 5", text)
			}
			v.SetInt(int64(i))
		}
	case reflect.Struct:
		d.eachKey(n, path, func(key string, keyToken *token.Token, value ast.Node) {
			f, ok := fieldOf(v, key)
			if !ok {
				d.unknownKey(join(path, key), keyToken, v.Type())
				return
			}
			d.decode(value, f, join(path, key))
			d.at(join(path, key), keyToken, value)
		}, join)
	case reflect.Map:
		m := reflect.MakeMap(v.Type())
		element := func(path, key string) string { return path + "[" + key + "]" }
		d.eachKey(n, path, func(key string, keyToken *token.Token, value ast.Node) {
			e := reflect.New(v.Type().Elem().Elem())
			d.decode(value, e.Elem(), element(path, key))
			d.at(element(path, key), keyToken, value)
			m.SetMapIndex(reflect.ValueOf(key), e)
		}, element)
		v.Set(m)
	case reflect.Slice:
		seq, ok := n.(*ast.SequenceNode)
		if !ok {
			d.fail(path, n.GetToken(), "want a list")
			return
		}
		s := reflect.MakeSlice(v.Type(), len(seq.Values), len(seq.Values))
		for i, e := range seq.Values {
			d.decode(e, s.Index(i), fmt.Sprintf("%s[%d]", path, i))
		}
		v.Set(s)
	case reflect.Bool:
		b, ok := n.(*ast.BoolNode)
		if !ok {
			d.fail(path, n.GetToken(), "want true or false")
			return
		}
		v.SetBool(b.Value)
	case reflect.String:
		if text, ok := d.text(n, path, v.Type() == reflect.TypeFor[Secret]()); ok {
			v.SetString(text)
		}
	default:
		panic("config: no decoder for " + v.Type().String())
	}
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

// at has errors about a whole mapping or list show its key.
func (d *decoder) at(path string, key *token.Token, value ast.Node) {
	if _, single := value.(ast.ScalarNode); !single {
		d.tokens[path] = key
	}
}

// unknownKey refuses a key. Its value is not shown: it may be a misspelt secret.
func (d *decoder) unknownKey(path string, key *token.Token, in reflect.Type) {
	d.errs = append(d.errs, &Error{
		Path: path, Line: key.Position.Line, unknown: true,
		Message: "unknown key; known here: " + strings.Join(keysOf(in), ", "),
		Excerpt: fmt.Sprintf("%4d | %s%s:", key.Position.Line, strings.Repeat(" ", max(0, key.Position.Column-1)), key.Value),
	})
}

// eachKey calls f for the keys of a mapping, and refuses one that stands twice.
// join makes the path of a key.
func (d *decoder) eachKey(n ast.Node, path string, f func(key string, tok *token.Token, value ast.Node), join func(path, key string) string) {
	var values []*ast.MappingValueNode
	switch m := n.(type) {
	case *ast.MappingNode:
		values = m.Values
	case *ast.MappingValueNode:
		values = []*ast.MappingValueNode{m}
	default:
		d.fail(path, n.GetToken(), "want keys and values")
		return
	}
	seen := make(map[string]bool)
	for _, kv := range values {
		tok := kv.Key.GetToken()
		key := tok.Value
		if seen[key] {
			d.fail(join(path, key), tok, "the key stands here twice")
			continue
		}
		seen[key] = true
		f(key, tok, kv.Value)
	}
}

var variable = regexp.MustCompile(`\$\{([A-Za-z_][A-Za-z0-9_]*)\}`)

// text reads a scalar and puts in the variables of the environment. A secret
// must be one: what stands in the file is read by whoever reads the file.
func (d *decoder) text(n ast.Node, path string, secret bool) (string, bool) {
	var text string
	switch s := n.(type) {
	case *ast.AnchorNode, *ast.AliasNode, *ast.TagNode:
		d.fail(path, n.GetToken(), "anchors, aliases and tags of YAML are not understood here")
		return "", false
	case *ast.LiteralNode:
		text = s.Value.Value
	case ast.ScalarNode:
		text = s.GetToken().Value
	default:
		d.fail(path, n.GetToken(), "want a single value")
		return "", false
	}
	if secret && variable.ReplaceAllString(text, "") != "" {
		// Without an excerpt: it would show the secret.
		d.errs = append(d.errs, &Error{Path: path, Line: n.GetToken().Position.Line, Message: "a secret does not belong into this file: use ${VARIABLE}, or the key with _file"})
		return "", false
	}
	if !d.expand {
		return text, true
	}
	ok := true
	text = variable.ReplaceAllStringFunc(text, func(v string) string {
		value, set := os.LookupEnv(v[2 : len(v)-1])
		if !set {
			d.fail(path, n.GetToken(), "%s is not set in the environment", v)
			ok = false
		}
		return value
	})
	return text, ok
}

func fieldOf(v reflect.Value, key string) (reflect.Value, bool) {
	for i := range v.NumField() {
		if yamlKey(v.Type().Field(i)) == key {
			return v.Field(i), true
		}
	}
	return reflect.Value{}, false
}

func keysOf(t reflect.Type) []string {
	var keys []string
	for i := range t.NumField() {
		if k := yamlKey(t.Field(i)); k != "" {
			keys = append(keys, k)
		}
	}
	return keys
}

// yamlKey is the key of a field, "" if it has none.
func yamlKey(f reflect.StructField) string {
	if k := f.Tag.Get("yaml"); k != "-" {
		return k
	}
	return ""
}

// maxSecret bounds the file of a *_file key in bytes.
const maxSecret = 64 << 10

// readSecret reads the file of a *_file key.
func readSecret(path string) (Secret, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if info.IsDir() || info.Size() > maxSecret {
		return "", fmt.Errorf("%s is no file that holds a secret", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxSecret+1)) // a pipe says nothing of its size
	if err != nil {
		return "", err
	}
	if len(data) > maxSecret {
		return "", fmt.Errorf("%s is no file that holds a secret", path)
	}
	s := strings.TrimRight(string(data), "\r\n")
	if s == "" {
		return "", errors.New("the file is empty")
	}
	return Secret(s), nil
}
