supply0 [3:0] low;
tran t[3:0] (a, low);
pulldown p[3:0] (a);
assign q = 1;
endmodule
