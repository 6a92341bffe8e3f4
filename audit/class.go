package audit

import (
	"cmp"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// createdSlack is how far an image's own time may be ahead of ours.
const createdSlack = 24 * time.Hour

// classify says what a move looks like by what is different, and by whether the ref
// meant the digest before. Tags beside it may tell more: classOfTags.
func classify(c *Comparison, was bool) Class {
	var order int
	known := false
	if c != nil {
		order, known = compareVersions(c.OldVersion, c.NewVersion)
	}
	switch {
	case c != nil && c.Class == ClassRebuild && c.Base != (Ref{}):
		return ClassBaseRefresh
	case c != nil && c.Class != "" && c.Class != ClassUnknown:
		return c.Class
	case known && order < 0:
		return ClassRelease
	case was, known && order > 0:
		return ClassRollback
	}
	return ClassUnknown
}

// classOfTags is classify by the full versions that the old and the new digest are.
func classOfTags(n Neighbourhood) Class {
	switch order, known := compareVersions(highest(n.Before), highest(n.Same)); {
	case known && order < 0:
		return ClassRelease
	case known && order > 0:
		return ClassRollback
	}
	return ClassUnknown
}

// highest is the number of the highest full version among tags, or "".
func highest(tags []string) (core string) {
	for _, tag := range tags {
		c := versionCore(tag)
		if order, known := compareVersions(core, c); core == "" || known && order < 0 {
			core = c
		}
	}
	return core
}

var coreShape = regexp.MustCompile(`^v?([0-9]+(\.[0-9]+){1,3})`)

// versionCore is the number of a full version, "" of other tags: a date may well be
// another name of a version.
func versionCore(tag string) string {
	if !versionShape.MatchString(tag) {
		return ""
	}
	return coreShape.FindStringSubmatch(tag)[1]
}

// compareVersions compares the numbers that two versions begin with. It does not know
// if one of them has none, and of the same numbers: what follows them may be anything.
func compareVersions(a, b string) (order int, known bool) {
	x, y := coreShape.FindStringSubmatch(a), coreShape.FindStringSubmatch(b)
	if x == nil || y == nil {
		return 0, false
	}
	order = slices.CompareFunc(strings.Split(x[1], "."), strings.Split(y[1], "."), func(m, n string) int {
		i, err := strconv.ParseUint(m, 10, 64)
		j, err2 := strconv.ParseUint(n, 10, 64)
		if err != nil || err2 != nil {
			return 0
		}
		return cmp.Compare(i, j)
	})
	return order, order != 0
}
