// Stands before a C++ answer to a LeetCode problem: what LeetCode has included, and a call of a function whose arguments come as
// one JSON list on standard input and whose result goes as JSON to descriptor 3. Types are read off the function's own.
// It runs inside the sandbox. Everything that depends on ListNode and TreeNode is a template: they are defined after this.

#include <bits/stdc++.h>
#include <unistd.h>

struct ListNode;
struct TreeNode;

namespace r1_harness {

constexpr int RESULT = 3;
constexpr std::size_t MOST_NODES = 1'000'000;  // of a linked list or tree that may be a ring

[[noreturn]] inline void stop(const std::string& reason) {
    dprintf(STDERR_FILENO, "%s\n", reason.c_str());
    _exit(2);
}

// JSON as json.dumps(value, ensure_ascii=False) writes it.
class Reader {
   public:
    explicit Reader(const std::string& text) : at_(text.c_str()) {}

    char peek() {
        while (*at_ == ' ') ++at_;
        return *at_;
    }

    bool take(char wanted) {
        if (peek() != wanted) return false;
        ++at_;
        return true;
    }

    bool take_word(std::string_view wanted) {
        peek();
        if (std::strncmp(at_, wanted.data(), wanted.size()) != 0) return false;
        at_ += wanted.size();
        return true;
    }

    void need(char wanted, const char* what) {
        if (!take(wanted)) fail(what);
    }

    // A number as text, or whatever else stands in its place.
    std::string_view word() {
        peek();
        const char* start = at_;
        at_ += std::strcspn(at_, ",]} ");
        return {start, static_cast<std::size_t>(at_ - start)};
    }

    std::string text() {
        need('"', "string");
        std::string result;
        while (*at_ && *at_ != '"') {
            if (*at_ != '\\') {
                result += *at_++;
                continue;
            }
            static const std::map<char, char> escapes = {{'n', '\n'}, {'t', '\t'}, {'r', '\r'}, {'b', '\b'}, {'f', '\f'}};
            const char escaped = *++at_;
            ++at_;
            if (escaped == 'u') {  // control characters only
                result += static_cast<char>(std::stoi(std::string(at_, 4), nullptr, 16));
                at_ += 4;
            } else {
                const auto found = escapes.find(escaped);
                result += found == escapes.end() ? escaped : found->second;
            }
        }
        need('"', "string");
        return result;
    }

    // Elements of a list, each taken by `read`.
    template <typename Read>
    void list(Read read) {
        need('[', "list");
        if (take(']')) return;
        do {
            read();
        } while (take(','));
        need(']', "list");
    }

    [[noreturn]] void fail(const char* wanted) const {
        stop("argument " + std::to_string(argument) + " is no " + wanted + ": " + std::string(at_, strnlen(at_, 40)));
    }

    int argument = 0;

   private:
    const char* at_;
};

// How a type comes as an argument and goes as a result.
template <typename T, typename = void>
struct Value {
    static_assert(sizeof(T) == 0, "tests have no arguments and results of this type");
};

template <typename T>
T read(Reader& reader) {
    return Value<T>::read(reader);
}

template <typename T>
void write(std::string& out, const T& value) {
    Value<T>::write(out, value);
}

template <>
struct Value<bool> {
    static bool read(Reader& reader) {
        if (reader.take_word("true")) return true;
        if (!reader.take_word("false")) reader.fail("bool");
        return false;
    }
    static void write(std::string& out, bool value) { out += value ? "true" : "false"; }
};

template <typename T>
struct Value<T, std::enable_if_t<std::is_integral_v<T>>> {
    static T read(Reader& reader) {
        T value{};
        const std::string_view word = reader.word();
        const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
        if (error != std::errc() || end != word.data() + word.size()) {
            const std::string type = (std::is_signed_v<T> ? "integer of " : "natural number of ") + std::to_string(8 * sizeof(T));
            stop("argument " + std::to_string(reader.argument) + " is no " + type + " bits: " + std::string(word.substr(0, 40)));
        }
        return value;
    }
    static void write(std::string& out, T value) { out += std::to_string(value); }
};

template <typename T>
struct Value<T, std::enable_if_t<std::is_floating_point_v<T>>> {
    static T read(Reader& reader) {
        const std::string word(reader.word());
        char* end = nullptr;
        const double value = std::strtod(word.c_str(), &end);
        if (word.empty() || *end) stop("argument " + std::to_string(reader.argument) + " is no number: " + word.substr(0, 40));
        return static_cast<T>(value);
    }
    static void write(std::string& out, T number) {
        const double value = static_cast<double>(number);
        char digits[32];
        std::snprintf(digits, sizeof digits, "%.17g", value);
        out += std::isnan(value) ? "NaN" : std::isinf(value) ? (value < 0 ? "-Infinity" : "Infinity") : digits;
    }
};

template <>
struct Value<std::string> {
    static std::string read(Reader& reader) { return reader.text(); }
    static void write(std::string& out, const std::string& value) {
        out += '"';
        for (const char character : value) {
            char escaped[8];
            if (character == '"' || character == '\\') {
                (out += '\\') += character;
            } else if (static_cast<unsigned char>(character) < 0x20) {
                std::snprintf(escaped, sizeof escaped, "\\u%04x", character);
                out += escaped;
            } else {
                out += character;
            }
        }
        out += '"';
    }
};

template <>
struct Value<char> {
    static char read(Reader& reader) {
        const std::string text = reader.text();
        if (text.size() != 1) stop("argument " + std::to_string(reader.argument) + " is not one character: " + text.substr(0, 40));
        return text[0];
    }
    static void write(std::string& out, char value) { Value<std::string>::write(out, std::string(1, value)); }
};

template <typename Each>
void write_list(std::string& out, std::size_t size, Each each) {
    out += '[';
    for (std::size_t index = 0; index < size; ++index) {
        if (index) out += ',';
        each(index);
    }
    out += ']';
}

template <typename T>
struct Value<std::vector<T>> {
    static std::vector<T> read(Reader& reader) {
        std::vector<T> values;
        reader.list([&] { values.push_back(r1_harness::read<T>(reader)); });
        return values;
    }
    static void write(std::string& out, const std::vector<T>& values) {
        write_list(out, values.size(), [&](std::size_t index) { r1_harness::write<T>(out, values[index]); });
    }
};

template <typename Node>
using ValueOf = std::decay_t<decltype(std::declval<Node>().val)>;

// The values of a list in order; without any, a null pointer.
template <typename Node>
struct LinkedList {
    static Node* read(Reader& reader) {
        std::vector<Node*> nodes;
        reader.list([&] { nodes.push_back(new Node(r1_harness::read<ValueOf<Node>>(reader))); });
        for (std::size_t index = 1; index < nodes.size(); ++index) nodes[index - 1]->next = nodes[index];
        return nodes.empty() ? nullptr : nodes[0];
    }
    static void write(std::string& out, Node* node) {
        if (!node) {
            out += "null";
            return;
        }
        std::vector<Node*> nodes;
        for (; node; node = node->next) {
            if (nodes.size() == MOST_NODES) stop("the linked list does not end");
            nodes.push_back(node);
        }
        out += R"({"linked_list":)";
        write_list(out, nodes.size(), [&](std::size_t at) { r1_harness::write<ValueOf<Node>>(out, nodes[at]->val); });
        out += '}';
    }
};

// The values of a tree level by level, null for a missing child and nothing below it; without any, a null pointer.
template <typename Node>
struct BinaryTree {
    static Node* read(Reader& reader) {
        std::vector<Node*> nodes;  // those that are there, in order: the parents of what follows
        std::size_t position = 0;  // of a value in the list; the children of the n-th node stand at 2n + 1 and 2n + 2
        reader.list([&] {
            Node* node = reader.take_word("null") ? nullptr : new Node(r1_harness::read<ValueOf<Node>>(reader));
            if (position > 0) {
                if ((position - 1) / 2 >= nodes.size()) reader.fail("tree");
                Node* parent = nodes[(position - 1) / 2];
                (position % 2 ? parent->left : parent->right) = node;
            }
            if (node) nodes.push_back(node);
            ++position;
        });
        return nodes.empty() ? nullptr : nodes[0];
    }
    static void write(std::string& out, Node* root) {
        if (!root) {
            out += "null";
            return;
        }
        std::vector<Node*> nodes = {root};
        for (std::size_t at = 0; at < nodes.size(); ++at) {
            if (nodes.size() > 2 * MOST_NODES) stop("the tree does not end");
            if (nodes[at]) nodes.insert(nodes.end(), {nodes[at]->left, nodes[at]->right});
        }
        while (!nodes.back()) nodes.pop_back();
        out += R"({"binary_tree":)";
        write_list(out, nodes.size(), [&](std::size_t at) {
            if (nodes[at]) {
                r1_harness::write<ValueOf<Node>>(out, nodes[at]->val);
            } else {
                out += "null";
            }
        });
        out += '}';
    }
};

template <>
struct Value<ListNode*> : LinkedList<ListNode> {};
template <>
struct Value<TreeNode*> : BinaryTree<TreeNode> {};

inline std::string read_input() {
    std::string text;
    char piece[65536];
    for (ssize_t size; (size = ::read(STDIN_FILENO, piece, sizeof piece)) > 0;) text.append(piece, size);
    return text;
}

[[noreturn]] inline void finish(const std::string& result) {
    for (std::size_t done = 0; done < result.size();) {
        const ssize_t size = ::write(RESULT, result.data() + done, result.size() - done);
        if (size <= 0) stop("the result cannot be written");
        done += size;
    }
    _exit(0);  // whatever the program registered to run at exit stays unrun
}

template <typename T>
struct Type {
    using type = T;
};

template <typename Result, typename... Parameters, typename Invoke>
[[noreturn]] void call_with(Invoke invoke) {
    const std::string input = read_input();
    Reader reader(input);
    const std::string takes = "the function takes " + std::to_string(sizeof...(Parameters)) + " arguments, the test gives ";
    reader.need('[', "list");
    const auto next = [&](auto type) {
        if (reader.argument++ ? !reader.take(',') : reader.peek() == ']') stop(takes + std::to_string(reader.argument - 1));
        return read<typename decltype(type)::type>(reader);
    };
    std::tuple<std::decay_t<Parameters>...> arguments{next(Type<std::decay_t<Parameters>>{})...};
    if (!reader.take(']')) stop(takes + "more");
    const auto forward = [&](auto&... values) -> Result { return invoke(std::forward<Parameters>(values)...); };
    std::string result;
    if constexpr (std::is_void_v<Result>) {
        std::apply(forward, arguments);
        result = "null";
    } else {
        write<std::decay_t<Result>>(result, std::apply(forward, arguments));
    }
    finish(result);
}

// One overload for each kind of function that an answer can have; an overloaded one fits none.
template <typename Class, typename Result, typename... Parameters>
[[noreturn]] void call(Result (Class::*function)(Parameters...)) {
    Class* solution = new Class();
    call_with<Result, Parameters...>([&](auto&&... values) -> Result {
        return (solution->*function)(std::forward<decltype(values)>(values)...);
    });
}

template <typename Class, typename Result, typename... Parameters>
[[noreturn]] void call(Result (Class::*function)(Parameters...) const) {
    const Class* solution = new Class();
    call_with<Result, Parameters...>([&](auto&&... values) -> Result {
        return (solution->*function)(std::forward<decltype(values)>(values)...);
    });
}

template <typename Result, typename... Parameters>
[[noreturn]] void call(Result (*function)(Parameters...)) {
    call_with<Result, Parameters...>([&](auto&&... values) -> Result {
        return function(std::forward<decltype(values)>(values)...);
    });
}

}  // namespace r1_harness

using namespace std;
