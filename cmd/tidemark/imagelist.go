package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/spf13/cobra"
)

// Files that name images, as people have them: a list with one image a line, a compose
// file (compose-spec, 05-services.md and 12-interpolation.md), or Kubernetes manifests
// in YAML or JSON. Which one it is, is told by what is in it.

// maxImageFile bounds such a file in bytes.
const maxImageFile = 16 << 20

// namedImages are the whole references of arguments and files, in order, each once.
// Everything that is wrong is told at once.
func namedImages(c *cobra.Command, args, files []string) ([]string, error) {
	var out []string
	var errs []error
	add := func(where, image string) {
		ref, err := expandImage(image)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s%w", where, err))
		} else if !slices.Contains(out, ref) {
			out = append(out, ref)
		}
	}
	for _, arg := range args {
		add("", arg)
	}
	for _, name := range files {
		content, err := readImageFile(c, name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		images, err := imagesIn(name, content, environment(name))
		if err != nil {
			errs = append(errs, err)
		}
		for _, im := range images {
			add(fmt.Sprintf("%s:%d: ", name, im.line), im.image)
		}
	}
	if len(errs) == 0 && len(out) == 0 {
		errs = append(errs, errors.New("no image is named: name some, or a file of them with -f"))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, usage(err)
	}
	return out, nil
}

func readImageFile(c *cobra.Command, name string) ([]byte, error) {
	in := c.InOrStdin()
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	content, err := io.ReadAll(io.LimitReader(in, maxImageFile+1))
	if err == nil && len(content) > maxImageFile {
		err = fmt.Errorf("%s: larger than %d bytes: it is no list of images", name, maxImageFile)
	}
	return content, err
}

// expandImage makes a whole reference of what may be a short name, as Docker does. A
// digest counts; what is left out is the tag latest.
func expandImage(s string) (string, error) {
	named, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		return "", fmt.Errorf("%.300q is not an image reference: %w", s, err)
	}
	return reference.TagNameOnly(named).String(), nil
}

// A namedImage is an image as a file names it.
type namedImage struct {
	image string
	line  int
}

// imagesIn finds the images that a file names. An error has the file and the line.
func imagesIn(name string, content []byte, env func(string) (string, bool)) ([]namedImage, error) {
	content = bytes.TrimPrefix(content, []byte("\ufeff"))
	file, err := parser.ParseBytes(content, 0)
	if err != nil || !hasMapping(file) {
		if looksStructured(content) && err != nil {
			return nil, fmt.Errorf("%s: it is neither YAML nor a list of images: %s", name, yaml.FormatError(err, false, true))
		}
		return listed(content), nil
	}
	var out []namedImage
	var errs []error
	for _, doc := range file.Docs {
		d := &document{name: name, env: env, anchors: make(map[string]ast.Node)}
		if doc.Body != nil {
			ast.Walk(d, doc.Body)
		}
		if d.read(doc.Body); d.aliases > maxAliases {
			d.wrong(doc.Body, "it has more than %d aliases, or one that is part of itself: write it without", maxAliases)
		}
		out, errs = append(out, d.images...), append(errs, d.errs...)
	}
	return out, errors.Join(errs...)
}

// hasMapping tells a document of YAML from a list: "nginx:1.27" is no key and value,
// for no space follows the colon.
func hasMapping(file *ast.File) bool {
	return slices.ContainsFunc(file.Docs, func(d *ast.DocumentNode) bool { return len((&document{}).pairs(d.Body)) > 0 })
}

// pairs are the keys and values of a mapping, its own before those that it merges.
func (d *document) pairs(n ast.Node) (out []*ast.MappingValueNode) {
	var own []*ast.MappingValueNode
	switch n := d.resolve(n).(type) {
	case *ast.MappingNode:
		own = n.Values
	case *ast.MappingValueNode:
		own = []*ast.MappingValueNode{n}
	}
	var merged []ast.Node
	for _, v := range own {
		if keyOf(v) == "<<" {
			merged = append(merged, v.Value)
			continue
		}
		out = append(out, v)
	}
	for _, m := range merged {
		if list, ok := m.(*ast.SequenceNode); ok {
			for _, v := range list.Values {
				out = append(out, d.pairs(v)...)
			}
		} else {
			out = append(out, d.pairs(m)...)
		}
	}
	return out
}

// resolve follows anchors and aliases.
func (d *document) resolve(n ast.Node) ast.Node {
	for range 100 { // an alias can lead to itself
		switch v := n.(type) {
		case *ast.AnchorNode:
			n = v.Value
		case *ast.AliasNode:
			if d.aliases++; d.aliases > maxAliases {
				return nil
			}
			n = d.anchors[v.Value.String()]
		case *ast.TagNode:
			n = v.Value
		default:
			return n
		}
	}
	return nil
}

// Visit implements ast.Visitor: it finds the anchors.
func (d *document) Visit(n ast.Node) ast.Visitor {
	if a, ok := n.(*ast.AnchorNode); ok {
		d.anchors[a.Name.String()] = a.Value
	}
	return d
}

func keyOf(v *ast.MappingValueNode) string {
	if s, ok := v.Key.(*ast.StringNode); ok {
		return s.Value
	}
	return v.Key.String()
}

// looksStructured tells a broken document from a list: no image has these.
func looksStructured(content []byte) bool {
	first, _, _ := bytes.Cut(bytes.TrimSpace(content), []byte("\n"))
	return bytes.HasPrefix(first, []byte("{")) || bytes.HasPrefix(first, []byte("---")) ||
		regexp.MustCompile(`(?m)^(apiVersion|kind|services|version|name|items|x-[a-z-]+):`).Match(content)
}

// listed reads a list: an image a line, # begins a comment.
func listed(content []byte) (out []namedImage) {
	lines := bufio.NewScanner(bytes.NewReader(content))
	lines.Buffer(nil, maxImageFile)
	for n := 1; lines.Scan(); n++ {
		text, _, _ := strings.Cut(lines.Text(), "#")
		if text = strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(text), "- ")); text != "" {
			out = append(out, namedImage{strings.Trim(text, `"'`), n})
		}
	}
	return out
}

// maxAliases bounds the aliases that are followed in a document: a few that name each
// other can stand for any number of things, and one that names itself has no end.
const maxAliases = 10_000

// A document is one of a file.
type document struct {
	name    string // of the file
	env     func(string) (string, bool)
	anchors map[string]ast.Node
	aliases int // that were followed
	images  []namedImage
	errs    []error
}

func (d *document) read(body ast.Node) {
	services, kind := d.child(body, "services"), d.text(d.child(body, "kind"))
	switch {
	case kind != "":
		d.object(body)
	case services != nil:
		for _, s := range d.pairs(services) {
			if im := d.child(s.Value, "image"); im != nil && d.resolve(im).Type() != ast.NullType {
				d.composed(im)
			}
		}
	case body != nil:
		d.wrong(body, "it is neither a list of images, a compose file (services) nor a Kubernetes manifest (kind)")
	}
}

// wrong notes what is wrong with a node.
func (d *document) wrong(n ast.Node, format string, args ...any) {
	d.errs = append(d.errs, fmt.Errorf("%s:%d: %w", d.name, line(n), fmt.Errorf(format, args...)))
}

func line(n ast.Node) int {
	if t := n.GetToken(); t != nil && t.Position != nil {
		return t.Position.Line
	}
	return 0
}

// child is the value of a key, nil if it is not there.
func (d *document) child(n ast.Node, key string) ast.Node {
	for _, v := range d.pairs(n) {
		if keyOf(v) == key {
			return v.Value
		}
	}
	return nil
}

// text is the value of a scalar.
func (d *document) text(n ast.Node) string {
	switch n := d.resolve(n).(type) {
	case *ast.StringNode:
		return n.Value
	case *ast.NullNode:
		return ""
	case *ast.LiteralNode:
		return strings.TrimSpace(n.Value.Value)
	case ast.ScalarNode:
		return fmt.Sprint(n.GetValue())
	}
	return ""
}

// composed takes the image of a service, whose variables are put in.
func (d *document) composed(n ast.Node) {
	image, errs := interpolate(d.text(n), d.env)
	for _, err := range errs {
		d.wrong(n, "%w", err)
	}
	if len(errs) == 0 {
		d.take(n, image)
	}
}

func (d *document) take(n ast.Node, image string) {
	if image == "" {
		d.wrong(n, "the image is empty: name one, or take the key out")
		return
	}
	d.images = append(d.images, namedImage{image, line(n)})
}

// object finds the containers of a Kubernetes object, wherever its kind has them: a
// Pod, a template of one, a list of objects.
func (d *document) object(n ast.Node) {
	switch n := d.resolve(n).(type) {
	case *ast.SequenceNode:
		for _, v := range n.Values {
			d.object(v)
		}
		return
	case nil:
		return
	}
	for _, v := range d.pairs(n) {
		switch key := keyOf(v); key {
		case "containers", "initContainers", "ephemeralContainers":
			d.each(v.Value, "image")
		case "volumes":
			if s, ok := d.resolve(v.Value).(*ast.SequenceNode); ok {
				for _, volume := range s.Values {
					if ref := d.child(d.child(volume, "image"), "reference"); ref != nil {
						d.take(ref, d.text(ref)) // an image volume
					}
				}
			}
		case "items", "spec", "template", "jobTemplate":
			d.object(v.Value)
		}
	}
}

func (d *document) each(n ast.Node, key string) {
	s, ok := d.resolve(n).(*ast.SequenceNode)
	if !ok {
		return
	}
	for _, v := range s.Values {
		if im := d.child(v, key); im != nil {
			d.take(im, d.text(im))
		}
	}
}

// variable is a variable as compose files have it, with what follows its name in
// braces: an operator and a word, in which there can be variables.
var (
	variable = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*`)
	operator = regexp.MustCompile(`^:?[-?+]`)
)

// interpolate puts variables in. One without a value and without a default is an
// error: an image would be another one.
func interpolate(s string, env func(string) (string, bool)) (string, []error) {
	var out strings.Builder
	var errs []error
	for {
		before, rest, found := strings.Cut(s, "$")
		out.WriteString(before)
		if !found {
			return out.String(), errs
		}
		if after, ok := strings.CutPrefix(rest, "$"); ok {
			out.WriteByte('$')
			s = after
			continue
		}
		inside, after, ok := braced(rest)
		name := variable.FindString(inside)
		op := operator.FindString(inside[len(name):])
		word := inside[len(name)+len(op):]
		if !ok || name == "" || op == "" && word != "" {
			return "", append(errs, fmt.Errorf("%q is no variable: it is written ${NAME} or ${NAME:-default}, and a dollar $$", "$"+rest))
		}
		s = after
		value, set := env(name)
		if strings.HasPrefix(op, ":") && value == "" {
			set = false
		}
		switch {
		case strings.HasSuffix(op, "+") && !set:
			value = ""
		case strings.HasSuffix(op, "+"), strings.HasSuffix(op, "-") && !set:
			var more []error
			value, more = interpolate(word, env)
			errs = append(errs, more...)
		case set:
		case strings.HasSuffix(op, "?"):
			errs = append(errs, fmt.Errorf("%s is not set: %s", name, word))
		default:
			errs = append(errs, fmt.Errorf("%s is not set: set it in the environment or in .env, or give it a default: ${%s:-…}", name, name))
		}
		out.WriteString(value)
	}
}

// braced splits what follows a dollar after the variable, which has braces or not.
func braced(s string) (inside, after string, ok bool) {
	if !strings.HasPrefix(s, "{") {
		n := len(variable.FindString(s))
		return s[:n], s[n:], true
	}
	depth := 0
	for i, r := range s {
		switch r {
		case '{':
			depth++
		case '}':
			if depth--; depth == 0 {
				return s[1:i], s[i+1:], true
			}
		}
	}
	return "", "", false
}

// environment is the process's, and below it the .env next to a compose file.
func environment(name string) func(string) (string, bool) {
	dotenv := make(map[string]string)
	if name != "-" {
		if content, err := os.ReadFile(filepath.Join(filepath.Dir(name), ".env")); err == nil {
			for l := range strings.Lines(string(content)) {
				key, value, ok := strings.Cut(strings.TrimPrefix(strings.TrimSpace(l), "export "), "=")
				if ok && !strings.HasPrefix(key, "#") {
					dotenv[strings.TrimSpace(key)] = unquoted(strings.TrimSpace(value))
				}
			}
		}
	}
	return func(key string) (string, bool) {
		if v, ok := os.LookupEnv(key); ok {
			return v, true
		}
		v, ok := dotenv[key]
		return v, ok
	}
}

// unquoted is a value of such a file, without its quotes or the comment after it.
func unquoted(s string) string {
	if s != "" && (s[0] == '"' || s[0] == '\'') {
		if inside, _, ok := strings.Cut(s[1:], s[:1]); ok {
			return inside
		}
	}
	value, _, _ := strings.Cut(s, " #")
	return strings.TrimSpace(value)
}
