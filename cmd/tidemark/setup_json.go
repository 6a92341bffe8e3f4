package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

// A jsonObject is where the parts of a JSON document are that is one object, so
// that it can be changed in one place and stay as it is in all others.
type jsonObject struct {
	doc         []byte
	open, close int // the document is {, at open-1, …, }, at close
	members     []jsonMember
}

// A jsonMember is a member of an object: its value is doc[at:end].
type jsonMember struct {
	key     string
	at, end int
}

func parseObject(doc []byte) (*jsonObject, error) {
	if len(bytes.TrimSpace(doc)) == 0 {
		doc = []byte("{}\n")
	}
	var any json.RawMessage
	if err := json.Unmarshal(doc, &any); err != nil {
		var syntax *json.SyntaxError
		if errors.As(err, &syntax) {
			return nil, fmt.Errorf("%s: this is no JSON: %w", textPlace(doc, int(syntax.Offset)-1), err)
		}
		return nil, fmt.Errorf("this is no JSON: %w", err)
	}
	o := &jsonObject{doc: doc}
	d := json.NewDecoder(bytes.NewReader(doc))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, errors.New("this is no JSON object")
	}
	o.open = int(d.InputOffset())
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return nil, err
		}
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return nil, err
		}
		end := int(d.InputOffset())
		o.members = append(o.members, jsonMember{key.(string), end - len(value), end})
	}
	if _, err := d.Token(); err != nil {
		return nil, err
	}
	o.close = int(d.InputOffset()) - 1
	return o, nil
}

// member finds the member of a name, nil if there is none.
func (o *jsonObject) member(key string) (*jsonMember, error) {
	var found *jsonMember
	for i := range o.members {
		if m := &o.members[i]; m.key == key {
			if found != nil {
				return nil, fmt.Errorf("%s: %q is there twice", textPlace(o.doc, m.at), key)
			}
			found = m
		}
	}
	return found, nil
}

// addToList returns a JSON document, which is an object, with value as the first
// of the list that is the object's key, unless the list has it already. The rest
// stays as it is, byte for byte.
func addToList(doc []byte, key, value string, same func(a, b string) bool) ([]byte, error) {
	o, err := parseObject(doc)
	if err != nil {
		return nil, err
	}
	m, err := o.member(key)
	if err != nil {
		return nil, err
	}
	if m == nil {
		text := fmt.Sprintf("%s: [%s]", quoteJSON(key), quoteJSON(value))
		if len(o.members) == 0 {
			return splice(o.doc, o.open, o.close, "\n  "+text+"\n"), nil
		}
		lead := leadingSpace(o.doc[o.open:])
		return splice(o.doc, o.open+len(lead), o.open+len(lead), text+","+between(lead)), nil
	}
	list := o.doc[m.at:m.end]
	var values []string
	if err := json.Unmarshal(list, &values); err != nil {
		return nil, fmt.Errorf("%s: %q is no list of texts", textPlace(o.doc, m.at), key)
	}
	for _, v := range values {
		if same(v, value) {
			return doc, nil
		}
	}
	if len(values) == 0 { // or null
		return splice(o.doc, m.at, m.end, "["+quoteJSON(value)+"]"), nil
	}
	lead := leadingSpace(list[1:])
	at := m.at + 1 + len(lead)
	return splice(o.doc, at, at, quoteJSON(value)+","+between(lead)), nil
}

// between is what stands between two members, when lead stands before the first.
func between(lead string) string {
	if strings.Contains(lead, "\n") {
		return lead
	}
	return " "
}

func leadingSpace(text []byte) string {
	return string(text[:len(text)-len(bytes.TrimLeft(text, " \t\r\n"))])
}

// splice returns text with insert instead of text[from:to].
func splice(text []byte, from, to int, insert string) []byte {
	return bytes.Join([][]byte{text[:from], []byte(insert), text[to:]}, nil)
}

func quoteJSON(s string) string {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(s); err != nil {
		panic("setup: " + err.Error()) // no text can make it fail
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// textPlace is what people call an offset.
func textPlace(text []byte, offset int) string {
	before := text[:min(max(offset, 0), len(text))]
	line := bytes.Count(before, []byte("\n"))
	return fmt.Sprintf("line %d, column %d", line+1, utf8.RuneCount(before[bytes.LastIndexByte(before, '\n')+1:])+1)
}
