package main

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
)

// A yamlWant is a value that must be in a YAML document.
type yamlWant struct {
	path  []string // keys
	value string
	list  bool // the value must be in a list
}

// parseYAML returns what a document consists of, nil if of nothing.
func parseYAML(doc []byte) (ast.Node, error) {
	f, err := parser.ParseBytes(doc, 0)
	if err != nil {
		var ye yaml.Error
		if errors.As(err, &ye) {
			return nil, fmt.Errorf("line %d: this is no YAML: %s", ye.GetToken().Position.Line, ye.GetMessage())
		}
		return nil, fmt.Errorf("this is no YAML: %w", err)
	}
	for line := range bytes.Lines(doc) {
		if bytes.Equal(bytes.TrimRight(line, " \t\r\n"), []byte("...")) {
			return nil, errors.New(`a line "..." ends the document: take it out`)
		}
	}
	if len(f.Docs) > 1 {
		return nil, errors.New("there are several documents: only one can count")
	}
	if len(f.Docs) == 0 || f.Docs[0].Body == nil {
		return nil, nil
	}
	if _, ok := f.Docs[0].Body.(ast.MapNode); !ok {
		return nil, fmt.Errorf("line %d: this is no mapping", yamlLine(f.Docs[0].Body))
	}
	return f.Docs[0].Body, nil
}

func yamlLine(n ast.Node) int { return n.GetToken().Position.Line }

// member finds a key of a mapping and its value, and the mapping's first key. They
// are nil if they are not there.
func yamlMember(m ast.MapNode, name string) (first, key ast.MapKeyNode, value ast.Node) {
	for it := m.MapRange(); it.Next(); {
		if first == nil {
			first = it.Key()
		}
		if it.Key().GetToken().Value == name {
			key, value = it.Key(), it.Value()
		}
	}
	return first, key, value
}

// findYAML is the value at a path of keys, nil if there is none.
func findYAML(node ast.Node, path ...string) ast.Node {
	for _, name := range path {
		m, ok := node.(ast.MapNode)
		if !ok {
			return nil
		}
		_, _, node = yamlMember(m, name)
	}
	return node
}

// addYAML returns a YAML document with what is wanted added to it, as text: what
// was there stays as it is, byte for byte. If another value is there, or if the
// place is written in a way that nothing can be added to, that is an error.
func addYAML(doc []byte, w yamlWant) ([]byte, error) {
	root, err := parseYAML(doc)
	if err != nil {
		return nil, err
	}
	if root == nil {
		return w.insert(doc, len(doc), w.block(w.path, 0))
	}
	var key ast.MapKeyNode // of node
	node := root
	for depth, name := range w.path {
		if node.Type() == ast.NullType {
			return w.insertAfter(doc, key, w.block(w.path[depth:], key.GetToken().Position.Column+1))
		}
		m, ok := node.(ast.MapNode)
		if !ok {
			return nil, w.cannot(node)
		}
		first, next, value := yamlMember(m, name)
		switch flow, ok := m.(*ast.MappingNode); {
		case next != nil:
			key, node = next, value
		case ok && flow.IsFlowStyle:
			return w.insertFlow(doc, flow, w.path[depth:])
		case key == nil:
			return w.insert(doc, len(doc), w.block(w.path, first.GetToken().Position.Column-1))
		default:
			return w.insertAfter(doc, key, w.block(w.path[depth:], first.GetToken().Position.Column-1))
		}
	}
	return doc, w.satisfiedBy(node)
}

// satisfiedBy tells what keeps a value from being what is wanted.
func (w *yamlWant) satisfiedBy(node ast.Node) error {
	values := []ast.Node{node}
	if list, ok := node.(*ast.SequenceNode); ok && w.list {
		values = list.Values
	}
	for _, v := range values {
		if s, ok := v.(ast.ScalarNode); ok && strings.TrimSuffix(fmt.Sprint(s.GetValue()), "/") == w.value {
			return nil
		}
	}
	return fmt.Errorf("line %d: there is another %s already: put %q there by hand, or take it out", yamlLine(node), strings.Join(w.path, "."), w.value)
}

func (w *yamlWant) cannot(node ast.Node) error {
	return fmt.Errorf("line %d: %s cannot be added here, because of how this is written: put it there by hand, with the value %q", yamlLine(node), strings.Join(w.path, "."), w.value)
}

// block is the value below keys, in lines of their own.
func (w *yamlWant) block(keys []string, column int) string {
	var b strings.Builder
	for i, k := range keys {
		fmt.Fprintf(&b, "%s%s:", strings.Repeat(" ", column+2*i), quoteYAML(k))
		if i < len(keys)-1 {
			b.WriteByte('\n')
		}
	}
	if w.list {
		fmt.Fprintf(&b, "\n%s- %q\n", strings.Repeat(" ", column+2*len(keys)), w.value)
	} else {
		fmt.Fprintf(&b, " %q\n", w.value)
	}
	return b.String()
}

// flow is the value below keys, within braces.
func (w *yamlWant) flow(keys []string) string {
	value := strconv.Quote(w.value)
	if w.list {
		value = "[" + value + "]"
	}
	for i, k := range slices.Backward(keys) {
		if value = quoteYAML(k) + ": " + value; i > 0 {
			value = "{" + value + "}"
		}
	}
	return value
}

// quoteYAML leaves words as they are, and quotes names of hosts.
func quoteYAML(key string) string {
	if strings.Trim(key, "abcdefghijklmnopqrstuvwxyz_") == "" {
		return key
	}
	return strconv.Quote(key)
}

// insertAfter puts text after the line of a key.
func (w *yamlWant) insertAfter(doc []byte, key ast.MapKeyNode, text string) ([]byte, error) {
	at := yamlOffset(doc, yamlLine(key)+1, 1)
	return w.insert(doc, at, text)
}

// insertFlow puts it first between the braces of a mapping.
func (w *yamlWant) insertFlow(doc []byte, m *ast.MappingNode, keys []string) ([]byte, error) {
	at := yamlOffset(doc, m.Start.Position.Line, m.Start.Position.Column) + 1
	text := w.flow(keys)
	if len(m.Values) > 0 {
		text += ", "
	}
	return w.insert(doc, at, text)
}

// yamlOffset is where a line and a column are, which count from 1. A column is a
// character.
func yamlOffset(doc []byte, line, column int) int {
	at := 0
	for l := range bytes.Lines(doc) {
		if line--; line == 0 {
			for i := range string(l) {
				if column--; column == 0 {
					return at + i
				}
			}
		}
		at += len(l)
	}
	return at
}

// insert puts text at an offset, and makes sure of what the document then says.
func (w *yamlWant) insert(doc []byte, at int, text string) ([]byte, error) {
	eol := "\n"
	if bytes.Contains(doc, []byte("\r\n")) {
		eol = "\r\n"
		text = strings.ReplaceAll(text, "\n", eol)
	}
	if at == len(doc) && at > 0 && doc[at-1] != '\n' {
		text = eol + text
	}
	updated := splice(doc, at, at, text)
	var was, is any
	if err := yaml.Unmarshal(doc, &was); err != nil {
		return nil, fmt.Errorf("this is no YAML: %w", err)
	}
	if err := yaml.Unmarshal(updated, &is); err != nil || !reflect.DeepEqual(is, w.in(was, w.path)) {
		return nil, fmt.Errorf("%s cannot be added, because of how this is written: put it there by hand, with the value %q", strings.Join(w.path, "."), w.value)
	}
	return updated, nil
}

// in is what a document says once the value is in it.
func (w *yamlWant) in(doc any, path []string) any {
	if len(path) == 0 && w.list {
		return []any{w.value}
	}
	if len(path) == 0 {
		return w.value
	}
	m, ok := doc.(map[string]any)
	if !ok {
		m = make(map[string]any)
	}
	m = maps.Clone(m)
	m[path[0]] = w.in(m[path[0]], path[1:])
	return m
}
