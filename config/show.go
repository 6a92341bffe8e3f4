package config

import (
	"bytes"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// String is the effective configuration as YAML, with secrets masked.
func (c *Config) String() string {
	var b bytes.Buffer
	show(&b, reflect.ValueOf(c).Elem(), "")
	return b.String()
}

func show(b *bytes.Buffer, v reflect.Value, indent string) {
	for i := range v.NumField() {
		key := yamlKey(v.Type().Field(i))
		if key == "" {
			continue
		}
		f := v.Field(i)
		switch _, isScalar := f.Addr().Interface().(scalar); {
		case isScalar:
			fmt.Fprintf(b, "%s%s: %v\n", indent, key, f.Interface())
		case f.Kind() == reflect.Pointer && f.IsNil():
			fmt.Fprintf(b, "%s%s:\n", indent, key)
		case f.Kind() == reflect.Pointer:
			fmt.Fprintf(b, "%s%s: %v\n", indent, key, f.Elem().Interface())
		case f.Kind() == reflect.Slice && f.Len() > 0 && f.Type().Elem().Kind() == reflect.Struct:
			fmt.Fprintf(b, "%s%s:\n", indent, key)
			for i := range f.Len() {
				var item bytes.Buffer
				show(&item, f.Index(i), indent+"    ")
				b.WriteString(indent + "  - " + strings.TrimLeft(item.String(), " "))
			}
		case f.Kind() == reflect.Struct:
			fmt.Fprintf(b, "%s%s:\n", indent, key)
			show(b, f, indent+"  ")
		case f.Kind() == reflect.Map:
			fmt.Fprintf(b, "%s%s:\n", indent, key)
			names := f.MapKeys()
			slices.SortFunc(names, func(x, y reflect.Value) int { return bytes.Compare([]byte(x.String()), []byte(y.String())) })
			for _, name := range names {
				fmt.Fprintf(b, "%s  %s:\n", indent, name)
				show(b, f.MapIndex(name).Elem(), indent+"    ")
			}
		default:
			fmt.Fprintf(b, "%s%s: %s\n", indent, key, showValue(f))
		}
	}
}

func showValue(v reflect.Value) string {
	switch v.Kind() {
	case reflect.Slice:
		s := "["
		for i := range v.Len() {
			if i > 0 {
				s += ", "
			}
			s += showValue(v.Index(i))
		}
		return s + "]"
	case reflect.String:
		s := fmt.Sprint(v.Interface()) // a Secret shows what it may
		if s == "" {
			return `""`
		}
		if plain.MatchString(s) && !reserved[strings.ToLower(s)] {
			return s
		}
		return strconv.Quote(s)
	}
	return fmt.Sprint(v.Interface())
}

// plain is text that YAML reads as itself.
var plain = regexp.MustCompile(`^[A-Za-z./][A-Za-z0-9_./:-]*[A-Za-z0-9_./-]$|^[0-9]+(\.[0-9]+){3}:[0-9]+$`)

// reserved are words that YAML reads as something else.
var reserved = map[string]bool{"null": true, "true": true, "false": true, "yes": true, "no": true, "on": true, "off": true}
