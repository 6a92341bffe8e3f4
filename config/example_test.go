package config_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"tidemark/config"
)

// In config.example.yaml a # that is followed by a key hides the key, one that
// is followed by a space is for the reader, and one that is followed by three
// spaces is for the reader who wants to copy.
var (
	hiddenKey  = regexp.MustCompile(`(?m)^( *)#([a-z])`)
	hiddenCopy = regexp.MustCompile(`(?m)^( *)#   (\S| +\S)`)
	prose      = regexp.MustCompile(`^ *#( |$)`)
)

func exampleFile(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile("../config.example.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// An operator who starts from the example starts from the defaults, whether or
// not the keys are taken out of their comments.
func TestExampleIsTheDefault(t *testing.T) {
	want := mustParse(t, "").String()
	example := exampleFile(t)
	if got := mustParse(t, example).String(); got != want {
		t.Errorf("as it stands it means\n%s\nwant the defaults\n%s", got, want)
	}
	if got := mustParse(t, hiddenKey.ReplaceAllString(example, "$1$2")).String(); got != want {
		t.Errorf("with its keys it means\n%s\nwant the defaults\n%s", got, want)
	}
	for i, line := range strings.Split(example, "\n") {
		if line != "" && !prose.MatchString(line) && !hiddenKey.MatchString(line) {
			t.Errorf("line %d is neither comment nor hidden key: %s", i+1, line)
		}
	}
}

// What the example shows to be copied works: a private registry, once its
// password is there, rules, and places to publish to.
func TestExampleToCopyLoads(t *testing.T) {
	file := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(file, []byte("s3cret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	text := hiddenKey.ReplaceAllString(exampleFile(t), "$1$2")
	text = hiddenCopy.ReplaceAllString(text, "$1$2")
	text = regexp.MustCompile(`(?m)^(  rules|  publish|  views|notify): \[\]$`).ReplaceAllString(text, "") // they stand there filled
	text = regexp.MustCompile(`/etc/tidemark/\S+`).ReplaceAllLiteralString(text, file)
	c := mustParse(t, text)
	u := c.Upstreams["registry.example"]
	if u == nil {
		t.Fatalf("the example has no registry.example:\n%s", c)
	}
	if u.Username != "puller" || u.Password != "s3cret" {
		t.Errorf("registry.example is asked as %q with %q, want puller with the password of its file", u.Username, string(u.Password))
	}
	if r := c.Audit.Rules; len(r) != 2 || r[0].FullVersion == nil || !*r[0].FullVersion || r[1].Mode != "cooldown" || r[1].Tenure == nil {
		t.Errorf("the rules of the example are %+v", r)
	}
	if p := c.Audit.Publish; len(p) != 2 || p[0].Path == "" || p[1].URL == "" {
		t.Errorf("the example publishes to %+v", p)
	}
}

// What can be written is in the example, and the example says about it what
// the comments in config.go say, each above its key.
func TestExampleIsTheManual(t *testing.T) {
	example := exampleFile(t)
	var tree map[string]any
	if err := yaml.Unmarshal([]byte(hiddenKey.ReplaceAllString(example, "$1$2")), &tree); err != nil {
		t.Fatal(err)
	}
	docs := fieldDocs(t)
	prose := proseAbove(example)

	var walk func(typ reflect.Type, at map[string]any, path string)
	walk = func(typ reflect.Type, at map[string]any, path string) {
		for i := range typ.NumField() {
			f := typ.Field(i)
			key := f.Tag.Get("yaml")
			if key == "-" {
				continue
			}
			value, ok := at[key]
			if !ok {
				t.Errorf("%s%s is not in the example", path, key)
				continue
			}
			if want := docs[typ.Name()+"."+f.Name]; !strings.Contains(prose[path+key], want) {
				t.Errorf("above %s%s the example says\n\t%s\nwant, as in config.go,\n\t%s", path, key, prose[path+key], want)
			}
			below, _ := value.(map[string]any)
			switch {
			case f.Type == reflect.TypeFor[map[string]*config.Upstream]():
				hub, _ := below["docker.io"].(map[string]any)
				walk(reflect.TypeFor[config.Upstream](), hub, path+key+".docker.io.")
			case below != nil:
				walk(f.Type, below, path+key+".")
			}
		}
	}
	walk(reflect.TypeFor[config.Config](), tree, "")
}

// proseAbove returns, by path of the key, the comment directly above it.
func proseAbove(example string) map[string]string {
	above := make(map[string]string)
	var path []string
	var text string
	for _, line := range strings.Split(example, "\n") {
		switch m := hiddenKey.FindStringSubmatch(line); {
		case m != nil:
			key := strings.TrimSpace(line)[1:]
			key = key[:strings.IndexByte(key+" ", ':')]
			path = append(path[:len(m[1])/2:len(m[1])/2], key)
			above[strings.Join(path, ".")] = strings.TrimSpace(text)
			text = ""
		case prose.MatchString(line):
			text += " " + strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(line), "#"))
		default:
			text = ""
		}
	}
	return above
}

// fieldDocs returns the comments of config.go by "Type.Field", or those of the
// field's type, in the words of the file: fields are called by their keys.
func fieldDocs(t *testing.T) map[string]string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "config.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	docs := make(map[string]string)
	types := make(map[string]string)
	structs := make(map[string]*ast.StructType)
	for _, d := range file.Decls {
		if g, ok := d.(*ast.GenDecl); ok && g.Tok == token.TYPE {
			spec := g.Specs[0].(*ast.TypeSpec)
			types[spec.Name.Name] = g.Doc.Text()
			structs[spec.Name.Name], _ = spec.Type.(*ast.StructType)
		}
	}
	for name, s := range structs {
		keys := make(map[string]string)
		for _, f := range s.Fields.List {
			keys[f.Names[0].Name] = reflect.StructTag(strings.Trim(f.Tag.Value, "`")).Get("yaml")
		}
		for _, f := range s.Fields.List {
			doc := f.Doc.Text()
			if id, ok := f.Type.(*ast.Ident); ok && doc == "" {
				doc = types[id.Name]
			}
			words := strings.Fields(doc)
			for i, w := range words {
				if key := keys[w]; key != "" {
					words[i] = key
				}
			}
			docs[name+"."+f.Names[0].Name] = strings.Join(words, " ")
		}
	}
	return docs
}
